//! Connections: a thread each, few at a time.

use super::packet::{Query, Rcode, is_answer};
use super::upstream::Upstreams;
use super::zone::Verdict;
use super::{Setup, judge};
use crate::host::thread;
use crate::host::wait::{Woken, pause, wait_any};
use crate::locks::Cancel;
use nix::poll::PollFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const CONNECTIONS_MAX: usize = 32;
const CONNECTIONS_PER_ASKER_MAX: usize = 4;
/// Of one connection, and how long it may take to send or take one.
const QUESTIONS_MAX: usize = 64;
const PATIENCE: Duration = Duration::from_secs(5);
/// For a resolver of the host's, all together.
const UPSTREAM_PATIENCE: Duration = Duration::from_secs(4);
const QUESTION_BYTES_MAX: usize = 4096;
const IDLE: Duration = Duration::from_secs(3600);
const ERROR_PAUSE: Duration = Duration::from_millis(100);

pub struct Connections {
    listener: TcpListener,
    setup: Arc<Setup>,
    cancel: Cancel,
    open: Vec<(IpAddr, JoinHandle<()>)>,
}

impl Connections {
    pub fn new(listener: TcpListener, setup: Arc<Setup>, cancel: Cancel) -> Self {
        Self { listener, setup, cancel, open: Vec::new() }
    }

    pub fn run(mut self) {
        loop {
            match wait_any(&[(self.listener.as_fd(), PollFlags::POLLIN)], Instant::now() + IDLE, &self.cancel) {
                Ok(Woken::Ready) => self.accept(),
                Ok(Woken::Deadline) => {}
                Ok(Woken::Cancelled) => break,
                Err(_) => self.rest(),
            }
        }
        for (_, thread) in self.open.drain(..) {
            let _ = thread.join();
        }
    }

    /// After an error that would come again at once: no descriptors, no memory.
    fn rest(&self) {
        let _ = pause(ERROR_PAUSE, &self.cancel);
    }

    fn accept(&mut self) {
        let (stream, asker) = match self.listener.accept() {
            Ok(accepted) => accepted,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => return,
            Err(_) => return self.rest(),
        };
        self.open.retain(|(_, thread)| !thread.is_finished());
        let of_asker = self.open.iter().filter(|(ip, _)| *ip == asker.ip()).count();
        if self.open.len() >= CONNECTIONS_MAX || of_asker >= CONNECTIONS_PER_ASKER_MAX {
            return;
        }
        let connection = Connection { stream, asker: asker.ip(), setup: self.setup.clone(), cancel: self.cancel.clone() };
        match thread::spawn("dns-connection", move || connection.serve()) {
            Ok(thread) => self.open.push((asker.ip(), thread)),
            Err(e) => log::debug!("name server: {e}"),
        }
    }
}

struct Connection {
    stream: TcpStream,
    asker: IpAddr,
    setup: Arc<Setup>,
    cancel: Cancel,
}

impl Connection {
    /// Until the asker has no more questions, or one of us has lost patience. Why is nobody's concern.
    fn serve(self) {
        if self.stream.set_nonblocking(true).is_err() {
            return;
        }
        for _ in 0..QUESTIONS_MAX {
            if self.serve_one().is_none() {
                return;
            }
        }
    }

    fn serve_one(&self) -> Option<()> {
        let packet = read_message(&self.stream, QUESTION_BYTES_MAX, Instant::now() + PATIENCE, &self.cancel)?;
        let reply = match judge(&self.setup, &packet, self.asker) {
            Verdict::Drop => return None,
            Verdict::Reply(reply) => reply,
            Verdict::Forward(query) => self.ask(&packet, &query).unwrap_or_else(|| query.refuse(Rcode::ServFail)),
        };
        write_message(&self.stream, &reply, Instant::now() + PATIENCE, &self.cancel)
    }

    /// The first answer of a resolver of the host's.
    fn ask(&self, packet: &[u8], query: &Query<'_>) -> Option<Vec<u8>> {
        let own = if let IpAddr::V4(own) = self.setup.listen.ip() { own } else { Ipv4Addr::UNSPECIFIED };
        let servers = Upstreams::new(self.setup.resolv_conf.clone(), own, self.setup.upstream_port).get(Instant::now());
        let deadline = Instant::now() + UPSTREAM_PATIENCE;
        servers.into_iter().find_map(|server| {
            let stream = connect(server, deadline, &self.cancel)?;
            write_message(&stream, packet, deadline, &self.cancel)?;
            let reply = read_message(&stream, usize::from(u16::MAX), deadline, &self.cancel)?;
            is_answer(&reply, query.id(), query.question()).then_some(reply)
        })
    }
}

fn connect(server: SocketAddr, deadline: Instant, cancel: &Cancel) -> Option<TcpStream> {
    let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None).ok()?;
    match rustix::net::connect(&fd, &server) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(_) => return None,
    }
    let stream = TcpStream::from(fd);
    is_ready(&stream, PollFlags::POLLOUT, deadline, cancel)?;
    matches!(stream.take_error(), Ok(None)).then_some(stream)
}

fn is_ready(stream: &TcpStream, what: PollFlags, deadline: Instant, cancel: &Cancel) -> Option<()> {
    matches!(wait_any(&[(stream.as_fd(), what)], deadline, cancel), Ok(Woken::Ready)).then_some(())
}

/// A message with its length before it (RFC 1035, 4.2.2).
fn read_message(stream: &TcpStream, max: usize, deadline: Instant, cancel: &Cancel) -> Option<Vec<u8>> {
    let mut len = [0; 2];
    read_all(stream, &mut len, deadline, cancel)?;
    let len = usize::from(u16::from_be_bytes(len));
    if len > max {
        return None;
    }
    let mut message = vec![0; len];
    read_all(stream, &mut message, deadline, cancel)?;
    Some(message)
}

fn read_all(mut stream: &TcpStream, buffer: &mut [u8], deadline: Instant, cancel: &Cancel) -> Option<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        is_ready(stream, PollFlags::POLLIN, deadline, cancel)?;
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return None,
            Ok(n) => filled += n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return None,
        }
    }
    Some(())
}

fn write_message(mut stream: &TcpStream, message: &[u8], deadline: Instant, cancel: &Cancel) -> Option<()> {
    let mut bytes = u16::try_from(message.len()).ok()?.to_be_bytes().to_vec();
    bytes.extend(message);
    let mut sent = 0;
    while sent < bytes.len() {
        is_ready(stream, PollFlags::POLLOUT, deadline, cancel)?;
        match stream.write(&bytes[sent..]) {
            Ok(n) => sent += n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return None,
        }
    }
    Some(())
}
