//! The daemon's log. A log call never blocks: it puts a line into a bounded queue, and one thread
//! writes the queue to stderr. If nothing reads stderr, only that thread blocks. Lines that do not
//! fit into the queue are dropped and counted, and the count is logged as soon as there is room
//! again.
//!
//! `env_logger` filters and formats (`RUST_LOG`). Panic messages use the same queue, because the
//! default hook would write to stderr from a thread that may hold locks. Builds with the lock
//! checker check every log call, because none may happen under a lock.

use super::wait::poll_until;
use crate::error::{Error, Result};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use nix::poll::{PollFd, PollFlags};
use std::borrow::Cow;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// The queue's capacity in lines.
const LINES_MAX: usize = 4096;
/// The maximum length of a line. Longer lines are truncated.
const LINE_BYTES_MAX: usize = 8 * 1024;
/// How long the daemon waits for the last lines when it exits.
pub const FLUSH_MAX: Duration = Duration::from_secs(1);
/// How long a panicking thread waits for its message to be written, because the process may abort
/// next.
const PANIC_FLUSH_MAX: Duration = Duration::from_millis(100);
/// The filter that applies if `RUST_LOG` is not set.
const DEFAULT_FILTER: &str = "info";

static LOG: OnceLock<Queue> = OnceLock::new();
/// The number of lines that were dropped since the process started.
static DROPPED: AtomicU64 = AtomicU64::new(0);

enum Item {
    Line(Vec<u8>),
    /// Requests an answer once all earlier lines are written.
    Flush(Sender<()>),
}

/// The sending end of the log. Clones share one writer.
#[derive(Clone)]
struct Queue {
    sender: Sender<Item>,
    dropped: Arc<AtomicU64>,
}

impl Queue {
    fn new(lines_max: usize) -> (Self, Receiver<Item>) {
        let (sender, receiver) = bounded(lines_max);
        (
            Self {
                sender,
                dropped: Arc::default(),
            },
            receiver,
        )
    }

    /// Queues a line without waiting. If the queue is full, drops and counts the line.
    fn put(&self, line: &[u8]) {
        let line = match line.len().checked_sub(LINE_BYTES_MAX) {
            None | Some(0) => line.to_vec(),
            Some(cut) => [
                &line[..LINE_BYTES_MAX],
                format!("... ({cut} more bytes)\n").as_bytes(),
            ]
            .concat(),
        };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.sender.try_send(Item::Line(line))
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all lines so far are written. Returns false at the deadline.
    fn flush(&self, deadline: Instant) -> bool {
        let (done, written) = bounded(1);
        self.sender
            .send_deadline(Item::Flush(done), deadline)
            .is_ok()
            && written.recv_deadline(deadline).is_ok()
    }
}

impl Write for Queue {
    /// Queues a record, which `env_logger` writes in one piece.
    fn write(&mut self, record: &[u8]) -> std::io::Result<usize> {
        self.put(record);
        Ok(record.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs the writer's thread, which ends when the last [`Queue`] is dropped.
fn write_all_of(receiver: &Receiver<Item>, dropped: &AtomicU64, mut out: impl Write + AsFd) {
    for item in receiver {
        match item {
            Item::Line(line) => write_line(&mut out, &line),
            Item::Flush(done) => drop(done.try_send(())),
        }
        // Report dropped lines after the next line, so that the reader sees roughly where the gap
        // is.
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            write_line(
                &mut out,
                format!("fcd: {lost} lines of this log were dropped: nobody read it in time\n")
                    .as_bytes(),
            );
        }
    }
}

/// Writes a line and waits as long as the reader takes. If the reader is gone, the line is lost.
fn write_line(out: &mut (impl Write + AsFd), line: &[u8]) {
    let mut rest = line;
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(n) if n > 0 => rest = &rest[n..],
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            // Another process that shares the descriptor has made it non-blocking.
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => wait_writable(out.as_fd()),
            _ => return,
        }
    }
}

fn wait_writable(fd: BorrowedFd<'_>) {
    let _ = poll_until(&mut [PollFd::new(fd, PollFlags::POLLOUT)], None);
}

/// Passes records to `env_logger` after the lock checker has checked the call.
struct Logger(env_logger::Logger);

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        crate::locks::check::log_call(record);
        self.0.log(record);
    }

    fn flush(&self) {
        flush();
    }
}

/// Sets up the log of this process. Call this function once, before anything logs.
pub fn init() -> Result<()> {
    let (queue, receiver) = Queue::new(LINES_MAX);
    let dropped = queue.dropped.clone();
    crate::host::thread::spawn("log", move || {
        write_all_of(&receiver, &dropped, std::io::stderr())
    })?;
    let filter = env_logger::Env::default().default_filter_or(DEFAULT_FILTER);
    let pipe = env_logger::Target::Pipe(Box::new(queue.clone()));
    let inner = env_logger::Builder::from_env(filter).target(pipe).build();
    // With the lock checker, calls that the filter would skip are checked as well.
    let level = if crate::locks::check::IS_ON {
        log::LevelFilter::Trace
    } else {
        inner.filter()
    };
    let twice = || Error::internal("set up the log: it is already set up");
    LOG.set(queue).map_err(|_| twice())?;
    log::set_boxed_logger(Box::new(Logger(inner))).map_err(|_| twice())?;
    log::set_max_level(level);
    std::panic::set_hook(Box::new(|panic| {
        let name = std::thread::current().name().unwrap_or("?").to_owned();
        let backtrace = std::backtrace::Backtrace::capture();
        let backtrace = match backtrace.status() {
            std::backtrace::BacktraceStatus::Captured => Cow::Owned(format!("\n{backtrace}")),
            _ => Cow::Borrowed(""),
        };
        say_within(
            &format!("thread '{name}': {panic}{backtrace}"),
            PANIC_FLUSH_MAX,
        );
    }));
    Ok(())
}

/// Writes a line that is not a log record, such as the error that ends the daemon, and waits up to
/// [`FLUSH_MAX`] for it to be written.
pub fn say(line: &str) {
    say_within(line, FLUSH_MAX);
}

fn say_within(line: &str, most: Duration) {
    match LOG.get() {
        Some(queue) => {
            queue.put(format!("{line}\n").as_bytes());
            queue.flush(Instant::now() + most);
        }
        None => eprintln!("{line}"),
    }
}

/// Returns the number of lines that were dropped since the process started, because nobody read the
/// log in time.
pub fn lines_dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Waits up to [`FLUSH_MAX`] until all lines so far are written.
pub fn flush() {
    if let Some(queue) = LOG.get() {
        queue.flush(Instant::now() + FLUSH_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, pipe};

    /// A log whose reader has not read anything, so that its writer is blocked.
    struct Stalled {
        queue: Queue,
        reader: PipeReader,
        writer: crate::sched::JoinHandle<()>,
    }

    const LINES: usize = 4;

    fn open() -> (Queue, Receiver<Item>, PipeReader, PipeWriter) {
        let (queue, receiver) = Queue::new(LINES);
        let (reader, writer) = pipe().unwrap();
        (queue, receiver, reader, writer)
    }

    fn begin(
        queue: &Queue,
        receiver: Receiver<Item>,
        writer: PipeWriter,
    ) -> crate::sched::JoinHandle<()> {
        let dropped = queue.dropped.clone();
        crate::host::thread::spawn("log", move || write_all_of(&receiver, &dropped, writer))
            .unwrap()
    }

    fn stalled() -> Stalled {
        let (queue, receiver, reader, writer) = open();
        rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
        let writer = begin(&queue, receiver, writer);
        // The line is longer than the pipe's buffer, so the writer blocks in the middle of it.
        queue.put(&[b'x'; LINE_BYTES_MAX]);
        while !queue.sender.is_empty() {
            std::thread::yield_now();
        }
        Stalled {
            queue,
            reader,
            writer,
        }
    }

    #[test]
    fn full_queue_drops_counts_and_reports_lines() {
        let Stalled {
            queue,
            reader,
            writer,
        } = stalled();
        for n in 0..LINES + 3 {
            queue.put(format!("line {n}\n").as_bytes());
        }
        assert!(
            !queue.flush(Instant::now()),
            "nobody reads, so nothing can be flushed"
        );
        let mut reader = BufReader::new(reader);
        reader.read_exact(&mut [0; LINE_BYTES_MAX]).unwrap();
        let mut lines = reader.lines();
        let mut next = || lines.next().unwrap().unwrap();
        assert_eq!(
            next(),
            "fcd: 3 lines of this log were dropped: nobody read it in time"
        );
        for n in 0..LINES {
            assert_eq!(next(), format!("line {n}"));
        }
        drop(queue);
        writer.join().unwrap();
    }

    #[test]
    fn flush_waits_for_earlier_lines_until_its_deadline() {
        let Stalled {
            queue,
            reader,
            writer,
        } = stalled();
        queue.put(b"the last line\n");
        assert!(!queue.flush(Instant::now() + Duration::from_millis(10)));
        let all =
            crate::host::thread::spawn("reader", move || std::io::read_to_string(reader).unwrap())
                .unwrap();
        assert!(queue.flush(Instant::now() + Duration::from_secs(20)));
        drop(queue);
        writer.join().unwrap();
        assert!(all.join().unwrap().ends_with("the last line\n"));
    }

    #[test]
    fn writer_truncates_long_lines_and_survives_a_closed_reader() {
        let (queue, receiver, reader, out) = open();
        let writer = begin(&queue, receiver, out);
        queue.put(&[b'y'; LINE_BYTES_MAX + 7]);
        let mut line = String::new();
        let mut reader = BufReader::new(reader);
        reader.read_line(&mut line).unwrap();
        assert!(line.ends_with("y... (7 more bytes)\n"), "{line}");
        drop(reader);
        queue.put(b"to nobody\n");
        assert!(queue.flush(Instant::now() + Duration::from_secs(20)));
        drop(queue);
        writer.join().unwrap();
    }

    #[test]
    fn non_blocking_stderr_loses_no_line() {
        let (queue, receiver, reader, out) = open();
        rustix::pipe::fcntl_setpipe_size(&out, 4096).unwrap();
        rustix::io::ioctl_fionbio(&out, true).unwrap();
        let writer = begin(&queue, receiver, out);
        queue.put(&[b'z'; LINE_BYTES_MAX]);
        queue.put(b"the end\n");
        drop(queue);
        let all = std::io::read_to_string(reader).unwrap();
        writer.join().unwrap();
        assert_eq!(all.len(), LINE_BYTES_MAX + "the end\n".len());
    }
}
