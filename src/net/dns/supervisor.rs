//! The daemon's side: one thread that owns the sockets and the helper. It carries questions to the helper and answers back,
//! looks up names and opens sockets to resolvers as the helper asks, and starts another helper when one ends.
//!
//! It never waits for the helper: what the channel does not take waits in a queue, and while there is one no more questions
//! are read. A guest's bytes only pass through.

use super::desk::{Action, Breach, CONNECTIONS_MAX, DATAGRAMS_MAX, Desk, Kind};
use super::limit::Limiter;
use super::protocol::{FROM_HELPER_BYTES_MAX, Order, QUESTION_BYTES_MAX};
use super::upstream::Upstreams;
use super::{Health, Names, Setup};
use crate::config::Subnet;
use crate::host::confine::{self, Helper};
use crate::host::wait::{sleep, timeout_until};
use crate::locks::Cancel;
use nix::poll::{PollFd, PollFlags, poll};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of one asker.
const PER_S: u32 = 500;
const BURST: u32 = 1000;
/// Questions, connections and messages that are taken before the others get their turn.
const TAKEN_AT_ONCE: usize = 64;
/// Messages that wait for room in the channel: a helper is due one answer for each of its askers.
const OUTBOX_MAX: usize = DATAGRAMS_MAX + CONNECTIONS_MAX;
/// Nothing is due: only a question, an answer or the end wake the thread.
const IDLE: Duration = Duration::from_secs(3600);
/// After an error that would come again at once: no descriptors, no memory.
const ERROR_PAUSE: Duration = Duration::from_millis(100);
/// Before the first start after an end; twice as long after each further one.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A helper that has lived so long is well.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// How long an ended helper's exit status is waited for.
const EXIT_PATIENCE: Duration = Duration::from_secs(1);

pub struct Supervisor {
    socket: UdpSocket,
    listener: TcpListener,
    setup: Setup,
    /// What [`confine::spawn`] knows the helper by.
    helper: &'static str,
    upstreams: Upstreams,
    limiter: Limiter,
    health: Arc<Health>,
    cancel: Cancel,
}

/// Why a helper has to be started again.
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
    /// Both sockets are non-blocking.
    pub fn new(
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
        Self { socket, listener, setup, helper, upstreams, limiter: Limiter::new(PER_S, BURST), health, cancel }
    }

    /// Serves until it is cancelled. The helper dies with this thread at the latest.
    pub fn run(mut self) {
        while !self.cancel.is_cancelled() {
            let End::Because(why) = self.serve() else { return };
            let failures = self.health.ended();
            let backoff = BACKOFF_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACKOFF_MAX);
            // A helper that ends at once, again and again, is not worth a line each time.
            if failures.is_power_of_two() {
                log::warn!("name server: its helper process ended: {why}; another one is started (end {failures} in a row)");
            }
            let _ = sleep(backoff, &self.cancel);
        }
    }

    /// From the start of a helper to its end.
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
            desk: Desk::new(now),
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

    /// Looks up a name; a panic of the daemon's own is a name that is not there.
    fn look_up<T>(&self, look: impl FnOnce(&dyn Names) -> Option<T>) -> Option<T> {
        let names = self.setup.names.as_ref();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(names))).unwrap_or_else(|_| {
            log::error!("a question for a name made the daemon panic");
            None
        })
    }
}

/// One helper's life.
struct Service<'a> {
    supervisor: &'a mut Supervisor,
    helper: Helper,
    desk: Desk,
    /// What the channel did not take yet.
    outbox: VecDeque<(Order, Option<OwnedFd>)>,
    listen_from: Instant,
    /// None once it is known to be well.
    healthy_from: Option<Instant>,
    buffer: Vec<u8>,
}

/// What is ready.
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
            self.desk.check(now)?;
            if self.healthy_from.is_some_and(|from| from <= now) {
                self.healthy_from = None;
                self.supervisor.health.is_well();
            }
        }
    }

    fn wait(&self) -> Result<Ready, End> {
        let now = Instant::now();
        let takes = self.outbox.is_empty();
        let channel = if takes { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        let is_asked = |is: bool| if is { PollFlags::POLLIN } else { PollFlags::empty() };
        let listens = self.listen_from <= now;
        let (cancel, this) = (&self.supervisor.cancel, &self.supervisor);
        let mut fds = [
            PollFd::new(cancel.fd(), PollFlags::POLLIN),
            PollFd::new(self.helper.channel.fd(), channel),
            PollFd::new(this.socket.as_fd(), is_asked(takes && self.desk.has_room())),
            PollFd::new(this.listener.as_fd(), is_asked(takes && listens)),
        ];
        let due = [self.desk.deadline(), self.healthy_from, (!listens).then_some(self.listen_from)];
        let deadline = due.into_iter().flatten().min().unwrap_or(now + IDLE);
        match poll(&mut fds, timeout_until(deadline)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(End::Because(format!("wait for questions: {e}"))),
        }
        if cancel.is_cancelled() {
            return Err(End::Cancelled);
        }
        let [_, channel, socket, listener] = fds;
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false) && !fd.events().is_empty();
        Ok(Ready { messages: is_ready(&channel), questions: is_ready(&socket), connections: is_ready(&listener) })
    }

    fn take_questions(&mut self, now: Instant) -> Result<(), End> {
        let mut buffer = [0; QUESTION_BYTES_MAX];
        for _ in 0..TAKEN_AT_ONCE {
            if !self.outbox.is_empty() || !self.desk.has_room() {
                break;
            }
            let (len, asker) = match self.supervisor.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // The error of an answer that did not reach its asker.
                Err(_) => continue,
            };
            let Some(asker) = served(asker, self.supervisor.setup.subnet) else { continue };
            if !self.supervisor.limiter.admit(IpAddr::V4(*asker.ip()), now) {
                continue;
            }
            if let Some(ticket) = self.desk.admit(asker, Kind::Datagram, now) {
                self.send(Order::Question { ticket, asker, packet: buffer[..len].to_vec() }, None)?;
            }
        }
        Ok(())
    }

    fn take_connections(&mut self, now: Instant) -> Result<(), End> {
        for _ in 0..TAKEN_AT_ONCE {
            let (stream, asker) = match self.supervisor.listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock) => return Ok(()),
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
                Err(_) => {
                    self.listen_from = now + ERROR_PAUSE;
                    return Ok(());
                }
            };
            let Some(asker) = served(asker, self.supervisor.setup.subnet) else { continue };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if let Some(ticket) = self.desk.admit(asker, Kind::Connection, now) {
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
                Err(e) => return Err(End::Because(format!("receive from it: {e}"))),
            };
            let action = self.desk.judge(&buffer[..len], now)?;
            self.act(action, now)?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action<'_>, now: Instant) -> Result<(), End> {
        match action {
            Action::FindAddress { ticket, asker, name } => {
                let address = self.supervisor.look_up(|names| names.address(name.as_str(), asker.into()));
                self.send(Order::Address { ticket, address }, None)
            }
            Action::FindName { ticket, asker, address } => {
                let name = self.supervisor.look_up(|names| names.name(address, asker.into()));
                self.send(Order::Name { ticket, name: name.and_then(|name| name.parse().ok()) }, None)
            }
            Action::OpenSocket { ticket, kind, skip, is_allowed } => {
                let socket = if is_allowed { self.supervisor.upstreams.open(kind, skip, now) } else { None };
                self.send(Order::Resolver { ticket }, socket)
            }
            Action::Send { to, packet } => {
                // An answer that cannot be sent now is as lost as one that is lost on the way: it is asked for again.
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
                // It is gone. Its last words and then the end of the channel are still to be received.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                    self.outbox.clear();
                    return Ok(());
                }
                Err(e) => return Err(End::Because(format!("send to it: {e}"))),
            }
        }
        Ok(())
    }

    /// The channel has ended.
    fn died(&mut self) -> End {
        End::Because(match self.helper.wait(Instant::now() + EXIT_PATIENCE) {
            Some(exit) => exit.to_string(),
            None => "it closed its channel, so it was killed".to_owned(),
        })
    }
}

/// The asker, if it is one of those who are answered: guests, and the host, whose own questions come from the bridge's address.
pub fn served(asker: SocketAddr, subnet: Subnet) -> Option<SocketAddrV4> {
    match asker {
        SocketAddr::V4(asker) if subnet.contains(*asker.ip()) || asker.ip().is_loopback() => Some(asker),
        _ => None,
    }
}
