//! The shortest case that still fails. proptest's own shrinking takes away one operation at a time and tries each of its
//! numbers too, which takes minutes where every try mounts.

use super::case::Case;
use std::time::{Duration, Instant};

/// By then it is short enough.
const LIMIT: Duration = Duration::from_secs(60);

/// Takes away steps and pieces of layers as long as `fails` says why it still does.
pub fn shrink(mut case: Case, mut why: String, fails: impl Fn(&Case) -> Option<String>) -> (Case, String) {
    let deadline = Instant::now() + LIMIT;
    let mut shorter = |case: &mut Case, candidate: Case| {
        if Instant::now() < deadline
            && let Some(said) = fails(&candidate)
        {
            (*case, why) = (candidate, said);
        }
    };
    // Stages need not follow each other.
    for stage in (0..case.stages.len()).rev() {
        let mut candidate = case.clone();
        candidate.stages.remove(stage);
        if !candidate.stages.is_empty() {
            shorter(&mut case, candidate);
        }
    }
    for stage in 0..case.stages.len() {
        thin(&mut case, |case| &mut case.stages[stage], &mut shorter);
    }
    for layer in 0..case.stack.len() - 1 {
        thin(&mut case, |case| &mut case.stack[layer], &mut shorter);
    }
    for layer in (0..case.stack.len() - 1).rev() {
        let mut candidate = case.clone();
        candidate.stack.remove(layer);
        // An overlay without an upper layer has at least two.
        if candidate.stack.len() > 1 {
            shorter(&mut case, candidate);
        }
    }
    // What the steps needed of each other before may no longer be so.
    for stage in 0..case.stages.len() {
        thin(&mut case, |case| &mut case.stages[stage], &mut shorter);
    }
    (case, why)
}

/// Takes ever smaller runs out of one list.
fn thin<T>(case: &mut Case, list: impl Fn(&mut Case) -> &mut Vec<T>, shorter: &mut impl FnMut(&mut Case, Case)) {
    let mut run = list(case).len();
    while run > 0 {
        let mut end = list(case).len();
        while end > 0 {
            let start = end.saturating_sub(run);
            let mut candidate = case.clone();
            list(&mut candidate).drain(start..end);
            shorter(case, candidate);
            end = start;
        }
        run /= 2;
    }
}
