//! A fake registry that sends the answers that a test chooses, valid or not.

use crate::host::thread::spawn;
use crate::host::wait::wait_uncancelled;
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// A request that the registry has received.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) headers: Vec<String>,
    pub(super) body: String,
    /// The number of earlier requests.
    pub(super) number: usize,
}

impl Asked {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }
}

/// The part of an answer after its header.
#[derive(Clone, Debug)]
enum Body {
    /// Bytes, and the `Content-Length` if it differs from their number.
    Bytes(Vec<u8>, Option<u64>),
    Chunked(Vec<u8>),
    /// Bytes without an end.
    Endless,
    /// One byte at a time, a few each second, without an end.
    Drip,
    /// Nothing, but the connection stays open.
    Silence,
}

#[derive(Clone, Debug)]
pub(super) struct Answer {
    head: String,
    body: Body,
}

impl Answer {
    pub(super) fn new(status: u16) -> Self {
        Self {
            head: format!("HTTP/1.1 {status} Status\r\nConnection: close\r\n"),
            body: Body::Bytes(Vec::new(), None),
        }
    }

    /// Sends bytes instead of HTTP.
    pub(super) fn raw(head: &str) -> Self {
        Self {
            head: head.into(),
            body: Body::Chunked(Vec::new()),
        }
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        self.head += &format!("{name}: {value}\r\n");
        self
    }

    pub(super) fn body(mut self, bytes: &[u8]) -> Self {
        self.body = Body::Bytes(bytes.to_vec(), None);
        self
    }

    /// Closes the connection after `bytes` although it has announced `length` bytes.
    pub(super) fn cut(mut self, bytes: &[u8], length: usize) -> Self {
        self.body = Body::Bytes(bytes.to_vec(), Some(length as u64));
        self
    }

    pub(super) fn chunked(mut self, bytes: &[u8]) -> Self {
        self.body = Body::Chunked(bytes.to_vec());
        self
    }

    pub(super) fn endless(mut self) -> Self {
        self.body = Body::Endless;
        self
    }

    pub(super) fn drip(mut self) -> Self {
        self.body = Body::Drip;
        self
    }

    pub(super) fn silence(mut self) -> Self {
        self.body = Body::Silence;
        self
    }

    /// Writes the answer. An error means that the client has closed the connection.
    fn send(&self, to: &mut TcpStream) -> std::io::Result<()> {
        to.write_all(self.head.as_bytes())?;
        match &self.body {
            Body::Bytes(bytes, length) => {
                let length = length.unwrap_or(bytes.len() as u64);
                write!(to, "Content-Length: {length}\r\n\r\n")?;
                to.write_all(bytes)
            }
            Body::Chunked(bytes) if !self.head.starts_with("HTTP") => to.write_all(bytes),
            Body::Chunked(bytes) => {
                write!(
                    to,
                    "Transfer-Encoding: chunked\r\n\r\n{:x}\r\n",
                    bytes.len()
                )?;
                to.write_all(bytes)?;
                to.write_all(b"\r\n0\r\n\r\n")
            }
            Body::Endless => {
                to.write_all(b"\r\n")?;
                loop {
                    to.write_all(&[b' '; 4096])?;
                }
            }
            Body::Drip => {
                to.write_all(b"\r\n")?;
                while !hangs_up(to, Duration::from_millis(5)) {
                    to.write_all(b" ")?;
                }
                Ok(())
            }
            Body::Silence => {
                hangs_up(to, Duration::from_secs(60));
                Ok(())
            }
        }
    }
}

/// Waits for the client to close the connection. Returns false if it does not do so in time.
pub(super) fn hangs_up(stream: &TcpStream, patience: Duration) -> bool {
    let fds = [(stream.as_fd(), PollFlags::POLLIN)];
    let result = wait_uncancelled(&fds, Instant::now() + patience).unwrap();
    result == crate::host::wait::WaitResult::Ready
}

/// A registry on loopback. It answers `/v2/` without asking the test, and closes TLS connections
/// immediately.
pub(super) struct Fake {
    pub(super) address: SocketAddr,
    seen: Receiver<Asked>,
    is_over: Arc<AtomicBool>,
}

impl Fake {
    pub(super) fn start(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, seen) = channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let server = Arc::new(Server {
            answer: Box::new(answer),
            requests: AtomicUsize::new(0),
        });
        let over = Arc::clone(&is_over);
        spawn("fake registry", move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (server, sender) = (Arc::clone(&server), sender.clone());
                spawn("fake connection", move || {
                    server.serve(stream.unwrap(), &sender)
                })
                .unwrap();
            }
        })
        .unwrap();
        Self {
            address,
            seen,
            is_over,
        }
    }

    /// Returns the registry's name in a reference.
    pub(super) fn name(&self) -> String {
        self.address.to_string()
    }

    /// Returns the requests since the last call.
    pub(super) fn seen(&self) -> Vec<Asked> {
        self.seen.try_iter().collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts connections.
        let _ = TcpStream::connect(self.address);
    }
}

struct Server {
    answer: Box<dyn Fn(&Asked) -> Answer + Send + Sync>,
    requests: AtomicUsize,
}

impl Server {
    fn serve(&self, mut stream: TcpStream, seen: &Sender<Asked>) {
        let mut first = [0];
        if !matches!(stream.peek(&mut first), Ok(1)) || first == [0x16] {
            return;
        }
        let Some(mut asked) = read_request(&stream) else {
            return;
        };
        if asked.method == "CONNECT" {
            let _ = seen.send(asked);
            let _ = stream.write_all(b"HTTP/1.1 200 Tunnel\r\n\r\n");
            return self.serve(stream, seen);
        }
        let answer = if asked.path == "/v2/" {
            Answer::new(200)
        } else {
            asked.number = self.requests.fetch_add(1, Ordering::SeqCst);
            let answer = (self.answer)(&asked);
            let _ = seen.send(asked);
            answer
        };
        let _ = answer.send(&mut stream);
        // Closing a socket with unread bytes would reset the connection.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        hangs_up(&stream, Duration::from_secs(60));
    }
}

fn read_request(stream: &TcpStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut words = lines.remove(0);
    words.truncate(words.rfind(' ')?);
    let (method, path) = words.split_once(' ')?;
    let mut asked = Asked {
        method: method.into(),
        path: path.into(),
        headers: lines,
        body: String::new(),
        number: 0,
    };
    let length = asked
        .header("content-length")
        .map_or(0, |n| n.parse().unwrap());
    reader.take(length).read_to_string(&mut asked.body).ok()?;
    Some(asked)
}
