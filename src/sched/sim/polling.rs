//! `poll` of the tasks that wait for descriptors.

use super::state::{On, Polled, with_me};
use super::time::Instant;
use crate::sched::real;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

fn poll_now(fds: &mut [PollFd<'_>]) -> io::Result<usize> {
    Ok(usize::try_from(poll(fds, PollTimeout::ZERO)?).unwrap_or(0))
}

fn poll_simulated(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> Option<io::Result<usize>> {
    with_me(|me| {
        me.sim.point(me.id);
        loop {
            let ready = poll_now(fds)?;
            let is_over = deadline.is_some_and(|d| Instant::now() >= d);
            if ready > 0 || is_over {
                return Ok(ready);
            }
            let polled = fds.iter().map(|fd| Polled {
                fd: fd.as_fd().as_raw_fd(),
                events: fd.events(),
            });
            let on = On::Poll(polled.collect());
            me.sim.wait(
                me.sim.core(),
                me.id,
                on,
                deadline.map(|d| d.offset(&me.sim)),
            );
        }
    })
}

pub fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<usize> {
    match poll_simulated(fds, deadline) {
        Some(result) => result,
        None => real::poll_until(fds, deadline.map(Instant::real)),
    }
}

/// Waits until a read of this descriptor would not block, because the read itself would block the
/// whole simulation. Returns false at the deadline.
pub fn before_read(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    !matches!(poll_simulated(&mut fds, Some(deadline)), Some(Ok(0)))
}
