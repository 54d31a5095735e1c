//! The daemon's side of the name server: one thread that owns the sockets and the helper. It passes
//! queries to the helper and answers to the clients, looks up names and opens sockets to resolvers
//! for the helper, and restarts the helper when it exits.
//!
//! The thread never blocks on the helper. Messages that do not fit into the channel wait in a
//! queue, and no more queries are read until the queue is empty. Guests' bytes are forwarded
//! without being parsed.

use super::gatekeeper::{Action, Breach, CONNECTIONS_MAX, DATAGRAMS_MAX, Gatekeeper, Kind};
use super::limit::Limiter;
use super::protocol::{FROM_HELPER_BYTES_MAX, Order, QUESTION_BYTES_MAX};
use super::upstream::Upstreams;
use super::{Health, Names, Setup};
use crate::config::Subnet;
use crate::host::confine::{self, Helper};
use crate::host::wait::{poll_until, sleep};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// The rate limit of one client, in queries per second.
const PER_S: u32 = 500;
const BURST: u32 = 1000;
/// The number of queries, connections or messages that are handled in a row before the other
/// descriptors.
const TAKEN_AT_ONCE: usize = 64;
/// The maximum number of messages that wait for room in the channel. The daemon sends the helper at
/// most one answer per client at a time.
const OUTBOX_MAX: usize = DATAGRAMS_MAX + CONNECTIONS_MAX;
/// How long to sleep if nothing is due. A query, a message or the cancellation wakes the thread
/// earlier.
const IDLE: Duration = Duration::from_secs(3600);
/// How long to pause after an error that would otherwise repeat at once, such as a lack of
/// descriptors.
const ERROR_PAUSE: Duration = Duration::from_millis(100);
/// The delay before the first restart. The delay doubles with each further exit in a row.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A helper counts as healthy after it has run for this long.
pub(super) const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// How long to wait for the exit status of a helper.
const EXIT_DEADLINE: Duration = Duration::from_secs(1);

pub(super) struct Supervisor {
    socket: UdpSocket,
    listener: TcpListener,
    setup: Setup,
    /// The helper's name for [`confine::spawn`].
    helper: &'static str,
    upstreams: Upstreams,
    limiter: Limiter,
    health: Arc<Health>,
    cancel: Cancel,
}

/// The reason why [`Service::run`] returned.
enum End {
    Cancelled,
    Because(String),
}

impl From<Breach> for End {
    fn from(breach: Breach) -> Self {
        End::Because(format!("{breach}, so it was killed"))
    }
}

impl Supervisor {
    /// Creates the supervisor without starting a helper. Both sockets must be non-blocking.
    pub(super) fn new(
        (socket, listener): (UdpSocket, TcpListener),
        setup: Setup,
        helper: &'static str,
        health: Arc<Health>,
        cancel: Cancel,
    ) -> Self {
        let own = match setup.listen.ip() {
            IpAddr::V4(own) => own,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let upstreams = Upstreams::new(setup.resolv_conf.clone(), own, setup.upstream_port);
        Self {
            socket,
            listener,
            setup,
            helper,
            upstreams,
            limiter: Limiter::new(PER_S, BURST),
            health,
            cancel,
        }
    }

    /// Serves until `cancel` fires, and restarts the helper when it exits. The helper never
    /// outlives this thread.
    pub(super) fn run(mut self) {
        while !self.cancel.is_cancelled() {
            let End::Because(why) = self.serve() else {
                return;
            };
            let failures = self.health.ended();
            let backoff = BACKOFF_MIN
                .saturating_mul(1 << failures.saturating_sub(1).min(16))
                .min(BACKOFF_MAX);
            // Log only some of the exits of a helper that keeps crashing.
            if failures.is_power_of_two() {
                log::warn!(
                    "name server: its helper process exited: {why}; restarting it (exit {failures} in a row)"
                );
            }
            let _ = sleep(backoff, &self.cancel);
        }
    }

    /// Starts a helper and serves until it exits.
    fn serve(&mut self) -> End {
        let helper = match confine::spawn(self.helper, self.setup.owner) {
            Ok(helper) => helper,
            Err(e) => return End::Because(e.to_string()),
        };
        self.health.started(helper.pid());
        let now = Instant::now();
        let mut service = Service {
            supervisor: self,
            helper,
            gatekeeper: Gatekeeper::new(now),
            outbox: VecDeque::new(),
            listen_from: now,
            healthy_from: Some(now + HEALTHY_AFTER),
            buffer: vec![0; FROM_HELPER_BYTES_MAX],
        };
        match service.run() {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    /// Looks up a name or an address. If the lookup panics, the result is None.
    fn look_up<T>(&self, look: impl FnOnce(&dyn Names) -> Option<T>) -> Option<T> {
        let names = self.setup.names.as_ref();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(names))).unwrap_or_else(
            |_| {
                log::error!("name server: looking up a name panicked");
                None
            },
        )
    }
}

/// The state of one helper.
struct Service<'a> {
    supervisor: &'a mut Supervisor,
    helper: Helper,
    gatekeeper: Gatekeeper,
    /// Messages that the channel has not accepted yet.
    outbox: VecDeque<(Order, Option<OwnedFd>)>,
    listen_from: Instant,
    /// When the helper will count as healthy, or None if it already does.
    healthy_from: Option<Instant>,
    buffer: Vec<u8>,
}

/// The descriptors that are ready.
struct Ready {
    messages: bool,
    questions: bool,
    connections: bool,
}

enum Never {}

impl Service<'_> {
    fn run(&mut self) -> Result<Never, End> {
        self.send(Order::Serve(self.supervisor.setup.subnet), None)?;
        loop {
            let ready = self.wait()?;
            let now = Instant::now();
            self.flush()?;
            if ready.messages {
                self.take_messages(now)?;
            }
            if ready.questions {
                self.take_questions(now)?;
            }
            if ready.connections {
                self.take_connections(now)?;
            }
            self.gatekeeper.check(now)?;
            if self.healthy_from.is_some_and(|from| from <= now) {
                self.healthy_from = None;
                self.supervisor.health.is_well();
            }
        }
    }

    fn wait(&self) -> Result<Ready, End> {
        let now = Instant::now();
        let takes = self.outbox.is_empty();
        let channel = if takes {
            PollFlags::POLLIN
        } else {
            PollFlags::POLLIN | PollFlags::POLLOUT
        };
        let is_asked = |is: bool| {
            if is {
                PollFlags::POLLIN
            } else {
                PollFlags::empty()
            }
        };
        let listens = self.listen_from <= now;
        let (cancel, this) = (&self.supervisor.cancel, &self.supervisor);
        let mut fds = [
            PollFd::new(cancel.fd(), PollFlags::POLLIN),
            PollFd::new(self.helper.channel.fd(), channel),
            PollFd::new(
                this.socket.as_fd(),
                is_asked(takes && self.gatekeeper.has_room()),
            ),
            PollFd::new(this.listener.as_fd(), is_asked(takes && listens)),
        ];
        let due = [
            self.gatekeeper.deadline(),
            self.healthy_from,
            (!listens).then_some(self.listen_from),
        ];
        let deadline = due.into_iter().flatten().min().unwrap_or(now + IDLE);
        poll_until(&mut fds, Some(deadline))
            .map_err(|e| End::Because(format!("wait for questions: {e}")))?;
        if cancel.is_cancelled() {
            return Err(End::Cancelled);
        }
        let [_, channel, socket, listener] = fds;
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false) && !fd.events().is_empty();
        Ok(Ready {
            messages: is_ready(&channel),
            questions: is_ready(&socket),
            connections: is_ready(&listener),
        })
    }

    fn take_questions(&mut self, now: Instant) -> Result<(), End> {
        let mut buffer = [0; QUESTION_BYTES_MAX];
        for _ in 0..TAKEN_AT_ONCE {
            if !self.outbox.is_empty() || !self.gatekeeper.has_room() {
                break;
            }
            let (len, client) = match self.supervisor.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // The error reports that an earlier answer was not delivered.
                Err(_) => continue,
            };
            let Some(client) = served(client, self.supervisor.setup.subnet) else {
                continue;
            };
            if !self.supervisor.limiter.admit(IpAddr::V4(*client.ip()), now) {
                continue;
            }
            if let Some(ticket) = self.gatekeeper.admit(client, Kind::Datagram, now) {
                self.send(
                    Order::Question {
                        ticket,
                        client,
                        packet: buffer[..len].to_vec(),
                    },
                    None,
                )?;
            }
        }
        Ok(())
    }

    fn take_connections(&mut self, now: Instant) -> Result<(), End> {
        for _ in 0..TAKEN_AT_ONCE {
            let (stream, client) = match self.supervisor.listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock) => return Ok(()),
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                    ) =>
                {
                    continue;
                }
                Err(_) => {
                    self.listen_from = now + ERROR_PAUSE;
                    return Ok(());
                }
            };
            let Some(client) = served(client, self.supervisor.setup.subnet) else {
                continue;
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if let Some(ticket) = self.gatekeeper.admit(client, Kind::Connection, now) {
                self.send(Order::Connection { ticket }, Some(stream.into()))?;
            }
        }
        Ok(())
    }

    fn take_messages(&mut self, now: Instant) -> Result<(), End> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let taken = self.take_messages_into(&mut buffer, now);
        self.buffer = buffer;
        taken
    }

    fn take_messages_into(&mut self, buffer: &mut [u8], now: Instant) -> Result<(), End> {
        for _ in 0..TAKEN_AT_ONCE {
            let len = match self.helper.channel.receive(buffer) {
                Ok(0) => return Err(self.died()),
                Ok(len) => len,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::InvalidData => return Err(Breach::Nonsense.into()),
                Err(e) => return Err(End::Because(format!("receive a message: {e}"))),
            };
            let action = self.gatekeeper.judge(&buffer[..len], now)?;
            self.act(action, now)?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action<'_>, now: Instant) -> Result<(), End> {
        crate::locks::may_block("file access");
        match action {
            Action::FindAddress {
                ticket,
                client,
                name,
            } => {
                let found = self
                    .supervisor
                    .look_up(|names| names.addresses(name.as_str(), client.into()));
                self.send(Order::Address { ticket, found }, None)
            }
            Action::FindName {
                ticket,
                client,
                address,
            } => {
                let name = self
                    .supervisor
                    .look_up(|names| names.name(address, client.into()));
                self.send(
                    Order::Name {
                        ticket,
                        name: name.and_then(|name| name.parse().ok()),
                    },
                    None,
                )
            }
            Action::OpenSocket {
                ticket,
                kind,
                skip,
                is_allowed,
            } => {
                let socket = if is_allowed {
                    self.supervisor.upstreams.open(kind, skip, now)
                } else {
                    None
                };
                self.send(Order::Resolver { ticket }, socket)
            }
            Action::Send { to, packet } => {
                // If the answer cannot be sent now, it counts as a lost packet, and the client
                // repeats its query.
                let _ = self.supervisor.socket.send_to(packet, to);
                Ok(())
            }
            Action::Nothing => Ok(()),
            Action::GiveUp(why) => Err(End::Because(why)),
        }
    }

    fn send(&mut self, order: Order, fd: Option<OwnedFd>) -> Result<(), End> {
        if self.outbox.len() >= OUTBOX_MAX {
            return Err(Breach::DoesNotRead.into());
        }
        self.outbox.push_back((order, fd));
        self.flush()
    }

    fn flush(&mut self) -> Result<(), End> {
        while let Some((order, fd)) = self.outbox.front() {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            match self.helper.channel.send(&order.encode(), &fds) {
                Ok(()) => drop(self.outbox.pop_front()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The helper has exited. Its last messages and the end of the channel can still be
                // received.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                    self.outbox.clear();
                    return Ok(());
                }
                Err(e) => return Err(End::Because(format!("send a message: {e}"))),
            }
        }
        Ok(())
    }

    /// Waits up to [`EXIT_DEADLINE`] for the helper to exit after its channel has closed, and
    /// returns why the helper ended.
    fn died(&mut self) -> End {
        End::Because(match self.helper.wait(Instant::now() + EXIT_DEADLINE) {
            Some(exit) => exit.to_string(),
            None => "it closed its channel, so it was killed".to_owned(),
        })
    }
}

/// Returns the client's address, or None if this client is not served. Clients are guests and the
/// host, whose queries come from the bridge's address.
pub(super) fn served(client: SocketAddr, subnet: Subnet) -> Option<SocketAddrV4> {
    match client {
        SocketAddr::V4(client) if subnet.contains(*client.ip()) || client.ip().is_loopback() => {
            Some(client)
        }
        _ => None,
    }
}
