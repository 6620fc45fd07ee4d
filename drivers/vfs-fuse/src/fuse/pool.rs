//! Threads for what may take long.

use parking_lot::{Condvar, Mutex};
use std::{collections::VecDeque, sync::Arc, thread, time::Duration};

/// More than so many slow requests at once wait for each other; each is mostly waiting for the disk.
const MOST: usize = 64;
/// An idle thread ends after this long.
const PATIENCE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// As many threads as there are slow requests, none when there are none.
#[derive(Default)]
pub struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
}

impl Pool {
    /// Has `job` done, at once unless [`MOST`] are being done. It must not panic.
    pub fn run(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) {
        let mut state = self.state.lock();
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() {
            self.work.notify_one();
        } else if state.threads < MOST {
            let pool = self.clone();
            match thread::Builder::new().name("slow".into()).spawn(move || pool.serve()) {
                Ok(_) => state.threads += 1,
                // Nobody else would ever do it.
                Err(_) if state.threads == 0 => {
                    let job = state.jobs.pop_back();
                    drop(state);
                    job.expect("pushed above")();
                }
                Err(_) => {}
            }
        }
    }

    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            while let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
            }
            state.idle += 1;
            let waited = self.work.wait_for(&mut state, PATIENCE);
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn no_job_waits_for_another() {
        let pool = Arc::new(Pool::default());
        let (go, gate) = mpsc::channel::<()>();
        let (done, results) = mpsc::channel();
        // The first can only end after the second has been done; twice, so that idle threads are met as well.
        let gate = Arc::new(Mutex::new(gate));
        for round in 0..2 {
            let (gate, first, second, go) = (gate.clone(), done.clone(), done.clone(), go.clone());
            pool.run(move || {
                gate.lock().recv().unwrap();
                first.send((round, 1)).unwrap();
            });
            pool.run(move || {
                second.send((round, 2)).unwrap();
                go.send(()).unwrap();
            });
            let order: Vec<_> = (0..2).map(|_| results.recv_timeout(Duration::from_secs(10)).unwrap()).collect();
            assert_eq!(order, [(round, 2), (round, 1)]);
        }
    }
}
