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
    threads: AtomicUsize,
    idle: Arc<AtomicUsize>,
    inside: AtomicUsize,
    /// Slow calls in event loops, at most.
    inside_max: usize,
}

impl Pool {
    /// A pool beside `loops` event loops.
    pub(super) fn new(loops: usize) -> Self {
        let (sender, receiver) = unbounded();
        Self {
            sender,
            receiver,
            threads: AtomicUsize::new(0),
            idle: Arc::default(),
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

    /// Runs a call in another thread.
    pub(super) fn hand_over(&self, job: impl FnOnce() + Send + 'static) {
        let is_short = self.receiver.len() >= self.idle.load(Ordering::SeqCst);
        if is_short && self.threads.load(Ordering::SeqCst) < THREADS_MAX {
            self.grow();
        }
        // The receiver lives as long as we do, so this cannot fail.
        let _ = self.sender.send(Box::new(job));
    }

    fn grow(&self) {
        let (receiver, idle) = (self.receiver.clone(), self.idle.clone());
        let number = self.threads.fetch_add(1, Ordering::SeqCst);
        let body = move || {
            loop {
                idle.fetch_add(1, Ordering::SeqCst);
                let job = receiver.recv();
                idle.fetch_sub(1, Ordering::SeqCst);
                match job {
                    Ok(job) => job(),
                    Err(_) => return,
                }
            }
        };
        let made = std::thread::Builder::new().name(format!("filter-slow-{number}")).spawn(body);
        if let Err(e) = made {
            self.threads.fetch_sub(1, Ordering::SeqCst);
            log::warn!("no thread for slow calls: {e}");
        }
    }
}
