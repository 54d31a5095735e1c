//! A pool of parked threads, on which tasks run.

use crate::sched::real;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The stack of a task's thread. Threads are reused, so all have the same.
const STACK_BYTES: usize = 1 << 20;

/// A job returns its end, which runs when the thread is idle again.
type Job = Box<dyn FnOnce() -> Box<dyn FnOnce()> + Send>;

struct Mailbox {
    next: Mutex<Option<Job>>,
    /// True if it is this thread's turn.
    may_run: AtomicBool,
}

/// A thread that runs tasks, one after the other.
#[derive(Clone)]
pub(super) struct Worker {
    mailbox: Arc<Mailbox>,
    thread: std::thread::Thread,
}

static IDLE: Mutex<Vec<Worker>> = Mutex::new(Vec::new());

/// Takes an idle thread, or starts one.
pub(super) fn take() -> Worker {
    let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
    idle.unwrap_or_else(|| {
        let mailbox = Arc::new(Mailbox {
            next: Mutex::new(None),
            may_run: AtomicBool::new(false),
        });
        let theirs = mailbox.clone();
        let thread = real::spawn("sim", STACK_BYTES, move || run_tasks(&theirs));
        let thread = thread.expect("start a thread").thread().clone();
        Worker { mailbox, thread }
    })
}

impl Worker {
    pub(super) fn give(&self, job: Job) {
        let mut next = self
            .mailbox
            .next
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *next = Some(job);
    }

    /// Makes it this thread's turn.
    pub(super) fn go(&self) {
        self.mailbox.may_run.store(true, Ordering::Release);
        self.thread.unpark();
    }

    /// Waits until it is this thread's turn.
    pub(super) fn wait(&self) {
        self.mailbox.wait();
    }
}

impl Mailbox {
    fn wait(&self) {
        while !self.may_run.swap(false, Ordering::Acquire) {
            std::thread::park();
        }
    }
}

fn run_tasks(mailbox: &Arc<Mailbox>) {
    loop {
        mailbox.wait();
        let assigned = mailbox
            .next
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(job) = assigned else {
            continue;
        };
        let end = job();
        let worker = Worker {
            mailbox: mailbox.clone(),
            thread: std::thread::current(),
        };
        // The thread is idle before the next task runs, because that task may take it.
        IDLE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(worker);
        end();
    }
}
