//! One thread that polls the descriptors of every value handed to it, for as long as its owner
//! lives. The consoles and the process watcher are built on it.

use crate::error::{Error, Result};
use crate::host::wait::poll_until;
use crate::locks::{Mutex, Rank};
use crate::sched::Instant;
use crate::sched::JoinHandle;
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// How long to wait after an error such as a lack of memory, instead of spinning.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

struct State<T> {
    incoming: Vec<T>,
    thread: Option<JoinHandle<()>>,
    is_closed: bool,
}

/// The side of the thread: where it receives values and polls for them.
pub(super) struct Inbox<T> {
    state: Mutex<State<T>>,
    wake: EventFd,
    name: &'static str,
}

impl<T> Inbox<T> {
    /// Waits until one of `fds` is readable or has failed, a value was handed over, or `deadline`
    /// has passed. Returns the indexes of the ready descriptors, or none after an error.
    pub(super) fn poll<'a>(
        &'a self,
        fds: impl Iterator<Item = BorrowedFd<'a>>,
        deadline: Option<Instant>,
    ) -> Vec<usize> {
        let mut polled = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        polled.extend(fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        if let Err(e) = poll_until(&mut polled, deadline) {
            log::error!("{}: poll: {e}", self.name);
            let _ = poll_until(&mut [], Some(Instant::now() + ERROR_PAUSE));
            return Vec::new();
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_none_or(|r| !r.is_empty());
        if is_ready(&polled[0]) {
            let _ = self.wake.read();
        }
        let ready = polled[1..].iter().enumerate();
        ready
            .filter(|(_, fd)| is_ready(fd))
            .map(|(i, _)| i)
            .collect()
    }

    /// Returns the values that were handed over since the last call, or None once the owner has
    /// been dropped and the thread must end.
    pub(super) fn take(&self) -> Option<Vec<T>> {
        let mut state = self.state.lock();
        let incoming = std::mem::take(&mut state.incoming);
        (!state.is_closed).then_some(incoming)
    }
}

/// The owner of the thread. Dropping it ends the thread.
pub(super) struct PollThread<T> {
    inbox: Arc<Inbox<T>>,
}

impl<T: Send + 'static> PollThread<T> {
    /// Prepares the thread `name`, which starts with the first value. Fails if no eventfd can be
    /// created (EMFILE, ENFILE).
    pub(super) fn try_new(name: &'static str) -> Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io(format!("create an eventfd for the thread {name}"), e))?;
        let state = State {
            incoming: Vec::new(),
            thread: None,
            is_closed: false,
        };
        Ok(Self {
            inbox: Arc::new(Inbox {
                state: Mutex::new(Rank::Consoles, state),
                wake,
                name,
            }),
        })
    }

    /// Hands `value` to the thread. Starts the thread with `run` if it is not running yet. Does not
    /// block.
    pub(super) fn add(&self, value: T, run: impl FnOnce(&Inbox<T>) + Send + 'static) -> Result<()> {
        let mut state = self.inbox.state.lock();
        if state.thread.is_none() {
            let inbox = self.inbox.clone();
            let body = move || run(&inbox);
            state.thread = Some(crate::host::thread::spawn(self.inbox.name, body)?);
        }
        state.incoming.push(value);
        drop(state);
        let _ = self.inbox.wake.write(1);
        Ok(())
    }
}

impl<T> Drop for PollThread<T> {
    fn drop(&mut self) {
        let mut state = self.inbox.state.lock();
        state.is_closed = true;
        let thread = state.thread.take();
        drop(state);
        let _ = self.inbox.wake.write(1);
        // A callback on the thread may own the last reference to this value, and a thread cannot
        // join itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != crate::sched::current().id()) {
            crate::locks::may_block("join");
            let _ = thread.join();
        }
    }
}
