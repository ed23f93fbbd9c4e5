//! Slow calls apart: syncs, and whatever else may block long, never occupy every event loop.
//!
//! A slow call runs where it came in as long as few others do (no hand-over, no latency); beyond
//! that it goes to threads of their own, made as needed, up to a limit, and kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, unbounded};

type Job = Box<dyn FnOnce() + Send>;

/// Threads beside the event loops, at most.
const THREADS_MAX: usize = 64;

pub(super) struct Pool {
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    threads: Arc<AtomicUsize>,
    /// Calls handed over that have not ended: beyond the number of threads, one waits for another.
    outstanding: Arc<AtomicUsize>,
    inside: AtomicUsize,
    /// Slow calls in event loops, at most.
    inside_max: usize,
}

/// Takes one off when dropped: after a panic, too.
struct Less(Arc<AtomicUsize>);

impl Drop for Less {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Pool {
    /// A pool beside `loops` event loops.
    pub(super) fn new(loops: usize) -> Self {
        let (sender, receiver) = unbounded();
        Self {
            sender,
            receiver,
            threads: Arc::default(),
            outstanding: Arc::default(),
            inside: AtomicUsize::new(0),
            inside_max: loops / 2,
        }
    }

    /// Runs a slow call, here or in another thread.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if self.inside.fetch_add(1, Ordering::SeqCst) < self.inside_max {
            job();
            self.inside.fetch_sub(1, Ordering::SeqCst);
        } else {
            self.inside.fetch_sub(1, Ordering::SeqCst);
            self.hand_over(job);
        }
    }

    /// Runs a call in another thread; in this one if there is none and none can be made.
    pub(super) fn hand_over(&self, job: impl FnOnce() + Send + 'static) {
        let outstanding = self.outstanding.fetch_add(1, Ordering::SeqCst) + 1;
        let less = Less(self.outstanding.clone());
        let threads = self.threads.load(Ordering::SeqCst);
        let is_short = outstanding > threads && threads < THREADS_MAX;
        if is_short && !self.grow() && self.threads.load(Ordering::SeqCst) == 0 {
            job();
            return;
        }
        let counted = move || {
            let _less = less;
            job();
        };
        // The receiver lives as long as we do, so this cannot fail.
        let _ = self.sender.send(Box::new(counted));
    }

    /// One thread more. `false`: it cannot be made.
    fn grow(&self) -> bool {
        let receiver = self.receiver.clone();
        let number = self.threads.fetch_add(1, Ordering::SeqCst);
        let less = Less(self.threads.clone());
        let body = move || {
            let _less = less;
            while let Ok(job) = receiver.recv() {
                job();
            }
        };
        // An error drops the body, and with it what it counts.
        let made = std::thread::Builder::new().name(format!("filter-slow-{number}")).spawn(body);
        made.map_err(|e| log::warn!("no thread for slow calls: {e}")).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_never_waits_for_a_hung_one_while_a_thread_can_be_made() {
        let pool = Pool::new(0);
        let (done, ends) = unbounded();
        let hung: Vec<_> = (0..THREADS_MAX - 1)
            .map(|_| {
                let (release, waits) = unbounded::<()>();
                let begun = done.clone();
                pool.run(move || {
                    let _ = begun.send(());
                    let _ = waits.recv();
                });
                release
            })
            .collect();
        hung.iter().for_each(|_| ends.recv().unwrap());
        pool.run(move || done.send(()).unwrap());
        ends.recv().unwrap();
        drop(hung);
    }
}
