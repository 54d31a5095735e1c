//! Datagrams: one thread, one `poll`.

use super::limit::Limiter;
use super::packet::{Query, Rcode, is_answer, set_id};
use super::upstream::Upstreams;
use super::zone::Verdict;
use super::{Setup, judge};
use crate::host::wait::{pause, timeout_until};
use crate::locks::Cancel;
use nix::poll::{PollFd, PollFlags, poll};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Questions at the host's resolvers at a time, and of one asker.
const PENDING_MAX: usize = 256;
const PENDING_PER_ASKER_MAX: usize = 64;
const PER_S: u32 = 500;
const BURST: u32 = 1000;
/// For one resolver's answer; then the next is asked, so often altogether.
const PATIENCE: Duration = Duration::from_secs(2);
const TRIES_MAX: usize = 3;
/// Questions that are taken before answers are looked for again.
const TAKEN_AT_ONCE: usize = 64;
/// Far above what a question needs.
const QUESTION_BYTES_MAX: usize = 4096;
const ANSWER_BYTES_MAX: usize = 65_535;
/// Nothing is due: only a question, an answer or the end wake the thread.
const IDLE: Duration = Duration::from_secs(3600);
/// After an error of `poll` itself.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

pub struct Datagrams {
    socket: UdpSocket,
    setup: Arc<Setup>,
    cancel: Cancel,
    limiter: Limiter,
    upstreams: Upstreams,
    pending: Vec<Pending>,
    buffer: Vec<u8>,
}

/// A question that a resolver of the host's was asked.
struct Pending {
    asker: SocketAddr,
    asker_id: u16,
    /// With the id of its own that this try has.
    packet: Vec<u8>,
    question: Vec<u8>,
    id: u16,
    /// Of its own for every try: its port is one more thing that a forger would have to know.
    socket: UdpSocket,
    deadline: Instant,
    tries: usize,
    /// For when nobody answers.
    failure: Vec<u8>,
}

impl Datagrams {
    pub fn new(socket: UdpSocket, setup: Arc<Setup>, cancel: Cancel) -> Self {
        let own = match setup.listen.ip() {
            IpAddr::V4(own) => own,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let upstreams = Upstreams::new(setup.resolv_conf.clone(), own, setup.upstream_port);
        let limiter = Limiter::new(PER_S, BURST);
        Self { socket, setup, cancel, limiter, upstreams, pending: Vec::new(), buffer: vec![0; ANSWER_BYTES_MAX] }
    }

    pub fn run(mut self) {
        while !self.cancel.is_cancelled() {
            let (has_questions, answered) = match self.wait() {
                Ok(ready) => ready,
                Err(e) => {
                    log::warn!("name server: wait for questions: {e}");
                    let _ = pause(ERROR_PAUSE, &self.cancel);
                    continue;
                }
            };
            let now = Instant::now();
            // Backwards, for what is done is taken out.
            for at in (0..self.pending.len()).rev() {
                if answered.get(at) == Some(&true) {
                    self.take_answer(at, now);
                } else if self.pending[at].deadline <= now {
                    self.try_again(at, now);
                }
            }
            if has_questions {
                self.take_questions(now);
            }
        }
    }

    /// Whether there are questions, and which of `pending` have something to read.
    fn wait(&self) -> nix::Result<(bool, Vec<bool>)> {
        let mut fds = vec![PollFd::new(self.cancel.fd(), PollFlags::POLLIN), PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.pending.iter().map(|p| PollFd::new(p.socket.as_fd(), PollFlags::POLLIN)));
        let next = self.pending.iter().map(|p| p.deadline).min().unwrap_or_else(|| Instant::now() + IDLE);
        match poll(&mut fds, timeout_until(next)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        Ok((ready[1], ready[2..].to_vec()))
    }

    fn take_questions(&mut self, now: Instant) {
        let mut buffer = [0; QUESTION_BYTES_MAX];
        for _ in 0..TAKEN_AT_ONCE {
            let (len, asker) = match self.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                // Of an answer that did not reach its asker.
                Err(_) => continue,
            };
            if self.limiter.admit(asker.ip(), now) {
                self.question(&buffer[..len], asker, now);
            }
        }
    }

    fn question(&mut self, packet: &[u8], asker: SocketAddr, now: Instant) {
        let setup = self.setup.clone();
        match judge(&setup, packet, asker.ip()) {
            Verdict::Drop => {}
            Verdict::Reply(reply) => self.reply(&reply, asker),
            Verdict::Forward(query) => self.forward(packet, &query, asker, now),
        }
    }

    /// An answer that cannot be sent now is as lost as one that is lost on the way: it is asked for again.
    fn reply(&self, packet: &[u8], asker: SocketAddr) {
        let _ = self.socket.send_to(packet, asker);
    }

    fn forward(&mut self, packet: &[u8], query: &Query<'_>, asker: SocketAddr, now: Instant) {
        let asker_id = query.id();
        // The asker has lost patience before we have.
        if self.pending.iter().any(|p| p.asker == asker && p.asker_id == asker_id && p.question == query.question()) {
            return;
        }
        let of_asker = self.pending.iter().filter(|p| p.asker.ip() == asker.ip()).count();
        let failure = query.refuse(Rcode::ServFail);
        if self.pending.len() >= PENDING_MAX || of_asker >= PENDING_PER_ASKER_MAX {
            return self.reply(&failure, asker);
        }
        let packet = packet.to_vec();
        match self.ask(&packet, 0, now) {
            Some((socket, id)) => {
                let question = query.question().to_vec();
                let deadline = now + PATIENCE;
                self.pending.push(Pending { asker, asker_id, packet, question, id, socket, deadline, tries: 1, failure });
            }
            None => self.reply(&failure, asker),
        }
    }

    /// Asks the next resolver that can be asked.
    fn ask(&mut self, packet: &[u8], tries: usize, now: Instant) -> Option<(UdpSocket, u16)> {
        let servers = self.upstreams.get(now);
        let mut packet = packet.to_vec();
        let mut ask = |server: SocketAddr| -> Option<(UdpSocket, u16)> {
            let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((any, 0)).ok()?;
            socket.set_nonblocking(true).ok()?;
            socket.connect(server).ok()?;
            let id = random_id()?;
            set_id(&mut packet, id);
            socket.send(&packet).ok()?;
            Some((socket, id))
        };
        let count = servers.len();
        servers.into_iter().cycle().skip(tries).take(count).find_map(&mut ask)
    }

    fn take_answer(&mut self, at: usize, now: Instant) {
        let pending = &self.pending[at];
        match pending.socket.recv(&mut self.buffer) {
            Ok(len) if is_answer(&self.buffer[..len], pending.id, &pending.question) => {
                let pending = self.pending.swap_remove(at);
                set_id(&mut self.buffer[..len], pending.asker_id);
                self.reply(&self.buffer[..len], pending.asker);
            }
            // Not its answer: it waits on.
            Ok(_) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {}
            // Nobody listens there.
            Err(_) => self.try_again(at, now),
        }
    }

    fn try_again(&mut self, at: usize, now: Instant) {
        let mut pending = self.pending.swap_remove(at);
        let asked = if pending.tries < TRIES_MAX { self.ask(&pending.packet, pending.tries, now) } else { None };
        let Some((socket, id)) = asked else { return self.reply(&pending.failure, pending.asker) };
        (pending.socket, pending.id, pending.deadline) = (socket, id, now + PATIENCE);
        pending.tries += 1;
        self.pending.push(pending);
    }
}

fn random_id() -> Option<u16> {
    let mut bytes = [0; 2];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).ok()?;
    (filled == bytes.len()).then(|| u16::from_ne_bytes(bytes))
}
