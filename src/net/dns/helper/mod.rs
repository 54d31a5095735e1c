//! The helper's side: gives up its rights, then reads questions and writes answers until the daemon ends it. One thread, one
//! `poll`.
//!
//! What is broken here is a restart: a panic ends the process, and the daemon starts another one.

mod connections;
mod datagrams;
pub mod packet;
pub mod zone;

use super::desk::{CONNECTIONS_MAX, DATAGRAMS_MAX};
use super::protocol::{Order, Request, TO_HELPER_BYTES_MAX, Ticket};
use crate::config::Subnet;
use crate::host::confine::{Asked, Channel, Profile};
use crate::host::wait::timeout_until;
use connections::Connections;
use datagrams::Datagrams;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use zone::Found;

/// What [`crate::host::confine::spawn`] knows this helper by.
pub const NAME: &str = "dns";

/// Questions under way are at most 3 MiB, answers of resolvers over TCP 2 MiB.
const MEMORY_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// The standard ones, a resolver's socket for each asker, the connections, and what is received before one of them is closed.
const OPEN_FILES_MAX: u64 = (3 + DATAGRAMS_MAX + 2 * CONNECTIONS_MAX + 8) as u64;
/// Messages that are taken before the others get their turn.
const TAKEN_AT_ONCE: usize = 64;
/// Nothing is due: only a message wakes the helper.
const IDLE: Duration = Duration::from_secs(3600);

const PROFILE: Profile = Profile {
    memory_bytes_max: MEMORY_BYTES_MAX,
    open_files_max: OPEN_FILES_MAX,
    has_threads: false,
    has_network: false,
    calls: &[],
};

/// Runs this process as the helper of a name server.
pub fn run(asked: &Asked) -> ExitCode {
    let daemon = Daemon(Channel::inherited());
    if let Err(e) = asked.confine(&PROFILE) {
        let _ = daemon.ask(&Request::Failed(e.to_string()));
        return ExitCode::FAILURE;
    }
    // Ends only when the daemon is gone, or says what it never says.
    let Gone = serve(&daemon);
    ExitCode::FAILURE
}

/// The way to the daemon is gone.
struct Gone;

impl From<io::Error> for Gone {
    fn from(_: io::Error) -> Self {
        Gone
    }
}

/// The daemon, which never stops reading.
struct Daemon(Channel);

impl Daemon {
    fn ask(&self, request: &Request<'_>) -> Result<(), Gone> {
        let message = request.encode();
        loop {
            match self.0.send(&message, &[]) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLOUT),
                sent => return Ok(sent?),
            }
        }
    }

    /// As long as it takes: when the daemon dies this process is killed.
    fn wait(&self, events: PollFlags) {
        let _ = poll(&mut [PollFd::new(self.0.fd(), events)], PollTimeout::NONE);
    }

    /// The next message, if there is one.
    fn next(&self, buffer: &mut [u8]) -> Result<Option<(Order, Option<OwnedFd>)>, Gone> {
        let received = match self.0.receive_with_fds(buffer) {
            Ok(received) => received,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(_) => return Err(Gone),
        };
        let order = Order::decode(&buffer[..received.len]).ok_or(Gone)?;
        Ok(Some((order, received.fds.into_iter().next())))
    }
}

fn serve(daemon: &Daemon) -> Gone {
    let mut buffer = vec![0; TO_HELPER_BYTES_MAX];
    daemon.wait(PollFlags::POLLIN);
    let Ok(Some((Order::Serve(subnet), _))) = daemon.next(&mut buffer) else { return Gone };
    let mut work = Work { daemon, subnet, datagrams: Datagrams::default(), connections: Connections::default() };
    loop {
        if let Err(gone) = work.once(&mut buffer) {
            return gone;
        }
    }
}

struct Work<'a> {
    daemon: &'a Daemon,
    subnet: Subnet,
    datagrams: Datagrams,
    connections: Connections,
}

impl Work<'_> {
    fn once(&mut self, buffer: &mut [u8]) -> Result<(), Gone> {
        let (has_messages, datagrams, connections) = self.wait()?;
        let now = Instant::now();
        self.datagrams.take_answers(&datagrams, self.daemon, now)?;
        self.connections.advance(&connections, self.daemon, self.subnet, now)?;
        for _ in 0..if has_messages { TAKEN_AT_ONCE } else { 0 } {
            let Some((order, fd)) = self.daemon.next(buffer)? else { break };
            self.follow(order, fd, now)?;
        }
        Ok(())
    }

    /// Whether there are messages, and which datagrams' and which connections' descriptors are ready.
    fn wait(&self) -> Result<(bool, Vec<bool>, Vec<bool>), Gone> {
        let mut fds = vec![PollFd::new(self.daemon.0.fd(), PollFlags::POLLIN)];
        let datagrams: Vec<_> = self.datagrams.waits().collect();
        let connections: Vec<_> = self.connections.waits().collect();
        // What waits for the daemon has no descriptor to be looked at.
        let looked_at = |waits: &[Option<(BorrowedFd<'_>, PollFlags)>]| waits.iter().map(Option::is_some).collect::<Vec<_>>();
        let (with_datagram, with_connection) = (looked_at(&datagrams), looked_at(&connections));
        fds.extend(datagrams.into_iter().chain(connections).flatten().map(|(fd, events)| PollFd::new(fd, events)));
        let due = [self.datagrams.deadline(), self.connections.deadline()].into_iter().flatten().min();
        match poll(&mut fds, timeout_until(due.unwrap_or_else(|| Instant::now() + IDLE))) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let has_messages = ready.next().unwrap_or(false);
        let mut take = |with: Vec<bool>| with.into_iter().map(|is| is && ready.next().unwrap_or(false)).collect();
        Ok((has_messages, take(with_datagram), take(with_connection)))
    }

    fn follow(&mut self, order: Order, fd: Option<OwnedFd>, now: Instant) -> Result<(), Gone> {
        match order {
            Order::Serve(_) => Err(Gone),
            Order::Question { ticket, asker, packet } => {
                self.datagrams.question((ticket, asker), packet, self.daemon, self.subnet)
            }
            Order::Connection { ticket } => match fd {
                Some(fd) => {
                    self.connections.open(ticket, fd, now);
                    Ok(())
                }
                // This process has no room for another descriptor.
                None => self.daemon.ask(&Request::Done { ticket }),
            },
            Order::Address { ticket, address } => self.found(ticket, &Found::Address(address), now),
            Order::Name { ticket, name } => self.found(ticket, &Found::Name(name), now),
            Order::Resolver { ticket } => {
                if self.connections.has(ticket) {
                    self.connections.resolver(ticket, fd, now);
                    Ok(())
                } else {
                    self.datagrams.resolver(ticket, fd, self.daemon, now)
                }
            }
        }
    }

    fn found(&mut self, ticket: Ticket, found: &Found, now: Instant) -> Result<(), Gone> {
        if self.connections.has(ticket) {
            self.connections.found(ticket, found, self.subnet, now);
            Ok(())
        } else {
            self.datagrams.found(ticket, found, self.daemon, self.subnet)
        }
    }
}
