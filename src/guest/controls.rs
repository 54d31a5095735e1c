//! A bounded queue that passes controls from the holders of its sender to the thread that runs the
//! command.

use super::{Control, Controls};
use crate::api::exec::signal_number;
use crate::error::{Error, Kind, Result};
use crate::locks::{Mutex, Rank};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Maximum number of queued controls.
pub(super) const QUEUE_MAX: usize = 64;

struct Queue {
    event: EventFd,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    controls: VecDeque<Control>,
    ended: bool,
}

/// The sending end. Clones share one queue.
#[derive(Clone)]
pub struct ControlSender(Arc<Queue>);

/// The receiving end. Dropping it closes the queue.
pub struct ControlReceiver(Arc<Queue>);

/// Creates a queue. Fails with `host` if no eventfd can be created.
pub fn control_queue() -> Result<(ControlSender, ControlReceiver)> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|e| Error::io("create an eventfd for a session's controls", e))?;
    let queue = Arc::new(Queue {
        event,
        waiting: Mutex::new(Rank::Sessions, Waiting::default()),
    });
    Ok((ControlSender(queue.clone()), ControlReceiver(queue)))
}

impl ControlSender {
    /// Queues a control without blocking. A resize replaces the last queued control if that control
    /// is also a resize. Errors: `invalid_argument` for an unknown signal, `busy` if the queue is
    /// full, `session_not_found` if the command has ended.
    pub fn send(&self, control: Control) -> Result<()> {
        let mut waiting = self.0.waiting.lock();
        if waiting.ended {
            return Err(Error::new(Kind::SessionNotFound, "the session has ended"));
        }
        if let Control::Signal(name) = &control
            && signal_number(name) == 0
        {
            return Err(Error::invalid(format!(
                "{:?} is not a signal",
                name.chars().take(32).collect::<String>()
            ))
            .hint("use a name such as INT, TERM or USR1"));
        }
        if matches!(
            (waiting.controls.back(), &control),
            (Some(Control::Resize(_)), Control::Resize(_))
        ) {
            waiting.controls.pop_back();
        }
        if waiting.controls.len() >= QUEUE_MAX {
            return Err(Error::new(
                Kind::Busy,
                format!("{QUEUE_MAX} signals are already queued for the session"),
            ));
        }
        waiting.controls.push_back(control);
        // The counter cannot overflow, because it is reset whenever the queue is emptied.
        let _ = self.0.event.write(1);
        Ok(())
    }
}

impl Controls for ControlReceiver {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
    fn next(&mut self) -> Option<Control> {
        let mut waiting = self.0.waiting.lock();
        let next = waiting.controls.pop_front();
        if waiting.controls.is_empty() {
            let _ = self.0.event.read(); // EAGAIN means that the counter was zero.
        }
        next
    }
}

impl Drop for ControlReceiver {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting.lock();
        waiting.ended = true;
        waiting.controls.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::exec::PtySize;
    use crate::host::wait::is_readable;

    #[test]
    fn control_queue_is_readable_only_while_controls_are_queued() {
        let (sender, mut receiver) = control_queue().unwrap();
        assert!(!is_readable(receiver.fd()));
        sender.send(Control::Signal("INT".into())).unwrap();
        sender.send(Control::Signal("TERM".into())).unwrap();
        assert!(is_readable(receiver.fd()));
        assert_eq!(receiver.next(), Some(Control::Signal("INT".into())));
        assert!(is_readable(receiver.fd()));
        assert_eq!(receiver.next(), Some(Control::Signal("TERM".into())));
        assert!(!is_readable(receiver.fd()));
        assert_eq!(receiver.next(), None);
    }

    #[test]
    fn control_queue_is_bounded_and_merges_resizes() {
        let (sender, mut receiver) = control_queue().unwrap();
        let size = |cols| Control::Resize(PtySize { rows: 24, cols });
        for cols in 0..1000 {
            sender.send(size(cols)).unwrap();
        }
        assert_eq!((receiver.next(), receiver.next()), (Some(size(999)), None));
        for _ in 0..QUEUE_MAX {
            sender.send(Control::Signal("INT".into())).unwrap();
        }
        assert_eq!(
            sender
                .send(Control::Signal("INT".into()))
                .unwrap_err()
                .kind(),
            Kind::Busy
        );
        for bad in ["", "SIGINT", "9", "INT; reboot", "int"] {
            assert_eq!(
                sender.send(Control::Signal(bad.into())).unwrap_err().kind(),
                Kind::InvalidArgument,
                "{bad}"
            );
        }
        drop(receiver);
        assert_eq!(
            sender.send(size(1)).unwrap_err().kind(),
            Kind::SessionNotFound
        );
    }
}
