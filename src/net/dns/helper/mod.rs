//! The helper process of the name server. It drops its privileges, and then parses queries and
//! writes answers until the daemon exits. It has one thread with one `poll`.
//!
//! It does not try to recover from faults: a panic ends the process, and the daemon starts another
//! one.

mod connections;
mod datagrams;
pub mod packet;
pub mod zone;

use super::gatekeeper::{CONNECTIONS_MAX, DATAGRAMS_MAX};
use super::protocol::{Order, Request, TO_HELPER_BYTES_MAX, Ticket};
use crate::config::Subnet;
use crate::host::confine::{Asked, Channel, Profile};
use crate::host::wait::poll_until;
use crate::sched::Instant;
use connections::Connections;
use datagrams::Datagrams;
use nix::poll::{PollFd, PollFlags};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;
use zone::Found;

/// This helper's name for [`crate::host::confine::spawn`].
pub const NAME: &str = "dns";

/// The limit of the helper's memory. Open queries need at most 3 MiB, and resolvers' answers over
/// TCP 2 MiB.
const MEMORY_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// The maximum number of files that the helper may have open. This is enough for the standard
/// streams, a resolver's socket per client, the connections, and a few descriptors that were just
/// received.
const OPEN_FILES_MAX: u64 = (3 + DATAGRAMS_MAX + 2 * CONNECTIONS_MAX + 8) as u64;
/// The number of messages that are handled in a row before the sockets.
const TAKEN_AT_ONCE: usize = 64;
/// How long to sleep if nothing is due. A message wakes the helper earlier.
const IDLE: Duration = Duration::from_secs(3600);

const PROFILE: Profile = Profile {
    memory_bytes_max: MEMORY_BYTES_MAX,
    open_files_max: OPEN_FILES_MAX,
    has_threads: false,
    has_network: false,
    readable: &[],
    file_bytes_max: 0,
    calls: &[],
};

/// Runs this process as the name server's helper.
pub fn run(asked: &Asked) -> ExitCode {
    let daemon = Daemon(Channel::inherited());
    if let Err(e) = asked.confine(&PROFILE) {
        let _ = daemon.ask(&Request::Failed(e.to_string()));
        return ExitCode::FAILURE;
    }
    // `serve` returns only if the daemon has exited or has broken the protocol.
    let Disconnected = serve(&daemon);
    ExitCode::FAILURE
}

/// The channel to the daemon is closed.
struct Disconnected;

impl From<io::Error> for Disconnected {
    fn from(_: io::Error) -> Self {
        Disconnected
    }
}

/// The channel to the daemon, which never stops reading.
struct Daemon(Channel);

impl Daemon {
    fn ask(&self, request: &Request<'_>) -> Result<(), Disconnected> {
        let message = request.encode();
        loop {
            match self.0.send(&message, &[]) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLOUT),
                sent => return Ok(sent?),
            }
        }
    }

    /// Waits for these events on the channel. No deadline is needed, because this process is killed
    /// when the daemon dies.
    fn wait(&self, events: PollFlags) {
        let _ = poll_until(&mut [PollFd::new(self.0.fd(), events)], None);
    }

    /// Returns the next message, if there is one.
    fn next(&self, buffer: &mut [u8]) -> Result<Option<(Order, Option<OwnedFd>)>, Disconnected> {
        let received = match self.0.receive_with_fds(buffer) {
            Ok(received) => received,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(_) => return Err(Disconnected),
        };
        let order = Order::decode(&buffer[..received.len]).ok_or(Disconnected)?;
        Ok(Some((order, received.fds.into_iter().next())))
    }
}

fn serve(daemon: &Daemon) -> Disconnected {
    let mut buffer = vec![0; TO_HELPER_BYTES_MAX];
    daemon.wait(PollFlags::POLLIN);
    let Ok(Some((Order::Serve(subnet), _))) = daemon.next(&mut buffer) else {
        return Disconnected;
    };
    let mut work = Work {
        daemon,
        subnet,
        datagrams: Datagrams::default(),
        connections: Connections::default(),
    };
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

/// The descriptors that are ready.
struct Ready {
    /// The daemon has sent something.
    messages: bool,
    datagrams: Vec<bool>,
    connections: Vec<bool>,
}

impl Work<'_> {
    fn once(&mut self, buffer: &mut [u8]) -> Result<(), Disconnected> {
        let ready = self.wait()?;
        let now = Instant::now();
        self.datagrams
            .take_answers(&ready.datagrams, self.daemon, now)?;
        self.connections
            .advance(&ready.connections, self.daemon, self.subnet, now)?;
        for _ in 0..if ready.messages { TAKEN_AT_ONCE } else { 0 } {
            let Some((order, fd)) = self.daemon.next(buffer)? else {
                break;
            };
            self.follow(order, fd, now)?;
        }
        Ok(())
    }

    fn wait(&self) -> Result<Ready, Disconnected> {
        let mut fds = vec![PollFd::new(self.daemon.0.fd(), PollFlags::POLLIN)];
        let datagrams: Vec<_> = self.datagrams.waits().collect();
        let connections: Vec<_> = self.connections.waits().collect();
        // Queries that wait for the daemon have no descriptor to poll.
        let looked_at = |waits: &[Option<(BorrowedFd<'_>, PollFlags)>]| {
            waits.iter().map(Option::is_some).collect::<Vec<_>>()
        };
        let (with_datagram, with_connection) = (looked_at(&datagrams), looked_at(&connections));
        fds.extend(
            datagrams
                .into_iter()
                .chain(connections)
                .flatten()
                .map(|(fd, events)| PollFd::new(fd, events)),
        );
        let due = [self.datagrams.deadline(), self.connections.deadline()]
            .into_iter()
            .flatten()
            .min();
        poll_until(&mut fds, Some(due.unwrap_or_else(|| Instant::now() + IDLE)))?;
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let messages = ready.next().unwrap_or(false);
        let mut take = |with: Vec<bool>| {
            with.into_iter()
                .map(|is| is && ready.next().unwrap_or(false))
                .collect()
        };
        Ok(Ready {
            messages,
            datagrams: take(with_datagram),
            connections: take(with_connection),
        })
    }

    fn follow(
        &mut self,
        order: Order,
        fd: Option<OwnedFd>,
        now: Instant,
    ) -> Result<(), Disconnected> {
        crate::locks::may_block("file access");
        match order {
            Order::Serve(_) => Err(Disconnected),
            Order::Question {
                ticket,
                client,
                packet,
            } => self
                .datagrams
                .question((ticket, client), packet, self.daemon, self.subnet),
            Order::Connection { ticket } => match fd {
                Some(fd) => {
                    self.connections.open(ticket, fd, now);
                    Ok(())
                }
                // The descriptor could not be received because this process has too many.
                None => self.daemon.ask(&Request::Done { ticket }),
            },
            Order::Address { ticket, found } => self.found(ticket, &Found::Address(found), now),
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

    fn found(&mut self, ticket: Ticket, found: &Found, now: Instant) -> Result<(), Disconnected> {
        if self.connections.has(ticket) {
            self.connections.found(ticket, found, self.subnet, now);
            Ok(())
        } else {
            self.datagrams
                .found(ticket, found, self.daemon, self.subnet)
        }
    }
}
