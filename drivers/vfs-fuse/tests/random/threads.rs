//! Several threads at once: each in a directory of its own, where everything is compared, and all in one that they share,
//! where nothing may go wrong that is not the caller's doing.

use super::{
    aim::{Names, aim},
    case::{self, Subject, Twins, Watchdog},
    common::Layers,
    known,
    op::{self, Op, Step},
    side::{Side, Value},
    stack::{self, Stack},
};
use proptest::{collection::vec, prelude::*};
use rustix::io::{Errno, Result as Io};
use std::{path::Path, thread};

const THREADS: usize = 4;

/// What each thread does.
#[derive(Clone, Debug)]
pub struct Plan {
    pub stack: Stack,
    pub threads: Vec<Vec<Task>>,
}

#[derive(Clone, Debug)]
pub struct Task {
    shared: bool,
    step: Step,
}

pub fn plans() -> impl Strategy<Value = Plan> {
    let task = (any::<bool>(), op::steps(1..2)).prop_map(|(shared, mut steps)| {
        // The threads have one umask together.
        Task { shared, step: Step { umask: 0o022, ..steps.remove(0) } }
    });
    // Through a mapping of a file that another thread shortens a write is SIGBUS, as everywhere.
    let task = task.prop_filter("SIGBUS", |task| !(task.shared && matches!(task.step.op, Op::MmapWrite { .. })));
    (stack::stacks(), vec(vec(task, 60..200), THREADS)).prop_map(|(stack, threads)| Plan { stack, threads })
}

/// Runs it on layers below `base`.
pub fn run(plan: &Plan, subject: Subject, base: &Path, options: &[&str]) -> Result<(), String> {
    let layers = Layers::on(base, plan.stack.len());
    for (layer, pieces) in layers.lowers.iter().zip(&plan.stack) {
        for name in (0..THREADS).map(|nth| format!("own{nth}")).chain(["shared".into()]) {
            let dir = layer.join(name);
            std::fs::create_dir(&dir).unwrap();
            stack::build(&dir, pieces);
        }
        stack::age(layer, &mut 0);
    }
    case::without_stray_whiteouts(&layers);
    let start = case::prepare(&layers, 0)?;
    let mounted = subject.mount(&layers, options);
    let watchdog = Watchdog::new(&mounted, subject);
    thread::scope(|scope| {
        let threads = plan.threads.iter().enumerate().map(|(nth, tasks)| {
            let (start, root) = (&start, mounted.path());
            scope.spawn(move || {
                let (plain, own) = (start.plain.join(format!("own{nth}")), root.join(format!("own{nth}")));
                let twins = Twins::new(&plain, &own, subject, start.loose.clone(), start.since)?;
                one_thread(tasks, twins, Side::new(&root.join("shared")))
            })
        });
        let outcomes: Vec<_> = threads.collect::<Vec<_>>().into_iter().map(|thread| thread.join()).collect();
        outcomes.into_iter().enumerate().try_for_each(|(nth, outcome)| match outcome {
            Ok(outcome) => outcome.map_err(|what| format!("in thread {nth}: {what}")),
            Err(_) => Err(format!("thread {nth} panicked")),
        })
    })?;
    let shown = case::read(mounted.path(), subject)?;
    mounted.unmount();
    drop(watchdog);
    case::check_again(&layers, 0, subject, options, &shown)
}

fn one_thread(tasks: &[Task], mut twins: Twins, mut shared: Side) -> Result<(), String> {
    for (nth, task) in tasks.iter().enumerate() {
        match task.shared {
            false => twins.aimed_step(nth, &task.step).map_err(|what| format!("{}{what}", twins.log()))?,
            true => {
                let step = aim(&task.step, nth, &Names::of(&shared.path), shared.open_slots());
                if known::leaves_out(twins.subject(), &step) {
                    continue;
                }
                let outcome = shared.step(&step);
                is_the_callers_doing(&step.op, &outcome)
                    .map_err(|what| format!("in the shared directory {step:?}: {what}"))?;
            }
        }
    }
    twins.compare().map(drop).map_err(|what| format!("{}{what}", twins.log()))
}

/// No error may come from the union itself, but for EXDEV of a rename: users' xattrs that another thread sets may leave the
/// mark of a directory no room in the one block that ext4 has for them.
fn is_the_callers_doing(op: &Op, outcome: &Io<Value>) -> Result<(), String> {
    const FORBIDDEN: [Errno; 9] = [
        Errno::IO,
        Errno::STALE,
        Errno::NOTCONN,
        Errno::CONNABORTED,
        Errno::NOSYS,
        Errno::XDEV,
        Errno::PROTO,
        Errno::NOMEM,
        Errno::MFILE,
    ];
    match outcome {
        Err(Errno::XDEV) if matches!(op, Op::Rename { .. }) => Ok(()),
        Err(e) if FORBIDDEN.contains(e) => Err(format!("gave {e}")),
        _ => Ok(()),
    }
}
