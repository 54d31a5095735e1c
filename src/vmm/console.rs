//! The consoles of all VMs. One thread reads the consoles and writes their logs, which are limited
//! in size. All other code reads the logs. A guest that floods its console uses only this thread's
//! time and a file of limited size.

use super::log_file::{LogReader, LogWriter};
use super::poll_thread::{Inbox, PollThread};
use crate::error::{Error, Result};
use crate::host::fs::{open_at, open_dir};
use crate::host::wait::set_nonblocking;
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::locks::{Cancel, Mutex, Rank};
use crate::sched::{HashMap, Instant};
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The maximum number of bytes of a log that are returned at once.
pub const CHUNK_BYTES_MAX: usize = 64 * 1024;
/// The name of the file in the VM's directory that receives the VMM's own output (stdout and
/// stderr).
pub const VMM_LOG: &str = "vmm.log";
/// The size limit of [`VMM_LOG`]. A larger log is truncated to length 0.
pub const VMM_LOG_BYTES_MAX: u64 = 256 * 1024;
/// How often the sizes of the VMMs' own logs are checked.
const TICK: Duration = Duration::from_secs(10);

fn event() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?)
}

/// A console to read, the directory of its log, the log's size limit, and a line from fcd that is
/// logged before the output.
pub(super) struct Attach {
    pub dir: PathBuf,
    pub bytes_max: u64,
    /// A socket, or the reading end of a pipe.
    pub from: File,
    pub mark: String,
}

struct Event {
    fd: EventFd,
    is_ended: AtomicBool,
}

#[derive(Default)]
struct State {
    followers: HashMap<PathBuf, Vec<Arc<Event>>>,
    /// The number of consoles that are being read into each log.
    attached: HashMap<PathBuf, usize>,
}

struct Shared {
    state: Mutex<State>,
}

impl Shared {
    fn detach(&self, dir: &Path) {
        let mut state = self.state.lock();
        if let Some(count) = state.attached.get_mut(dir) {
            *count -= 1;
            if *count == 0 {
                state.attached.remove(dir);
            }
        }
        drop(state);
        self.notify(dir);
    }

    fn notify(&self, dir: &Path) {
        for event in self.state.lock().followers.get(dir).into_iter().flatten() {
            // An eventfd whose counter is full is readable as well.
            let _ = event.fd.write(1);
        }
    }
}

/// The consoles of all VMs. Dropping this value ends the thread that reads them. The VMs keep
/// running, and their output waits for the next daemon.
pub struct Consoles {
    shared: Arc<Shared>,
    thread: PollThread<Attach>,
}

impl Consoles {
    /// Creates the consoles. The thread starts with the first console. Fails if no eventfd can be
    /// created (EMFILE, ENFILE).
    pub fn try_new() -> Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::new(Rank::Consoles, State::default()),
            }),
            thread: PollThread::try_new("consoles")?,
        })
    }

    /// Hands a console to the thread, which reads the console to its end. Starts the thread if it
    /// is not running yet. Does not block.
    pub(super) fn attach(&self, console: Attach) -> Result<()> {
        set_nonblocking(&console.from).map_err(|e| Error::io("attach to a console", e))?;
        let dir = console.dir.clone();
        // Count the console first, because the thread may read it to its end at once.
        *self
            .shared
            .state
            .lock()
            .attached
            .entry(dir.clone())
            .or_default() += 1;
        let shared = self.shared.clone();
        let added = self
            .thread
            .add(console, |inbox| Reader::new(shared).run(inbox));
        if added.is_err() {
            self.shared.detach(&dir);
        }
        added
    }

    /// Follows the log of the VM in `dir`, starting with its last `tail` lines, or at its beginning
    /// if `tail` is None. The VM need not be running, and may never have run.
    pub fn follow(&self, dir: &Path, tail: Option<u64>) -> Result<Follower> {
        crate::locks::may_block("file access");
        let doing = || format!("read the console log in {}", dir.display());
        let fd = event().map_err(|e| Error::io(doing(), e))?;
        let event = Arc::new(Event {
            fd,
            is_ended: AtomicBool::new(false),
        });
        // Register before opening the log, so that no change is missed.
        self.shared
            .state
            .lock()
            .followers
            .entry(dir.to_owned())
            .or_default()
            .push(event.clone());
        let mut follower = Follower {
            shared: self.shared.clone(),
            dir: dir.to_owned(),
            event,
            reader: None,
            partial: Vec::new(),
        };
        // The directory of a VM that has never run does not exist yet.
        if dir.exists() {
            follower.reader = Some(LogReader::open(dir, tail).map_err(|e| Error::io(doing(), e))?);
        }
        Ok(follower)
    }

    /// True while the console has not been read to its end, so more may be appended to this log.
    pub(super) fn is_attached(&self, dir: &Path) -> bool {
        self.shared.state.lock().attached.contains_key(dir)
    }

    /// Ends all followers of this log, because the VM has been deleted.
    pub fn forget(&self, dir: &Path) {
        for event in self
            .shared
            .state
            .lock()
            .followers
            .get(dir)
            .into_iter()
            .flatten()
        {
            event.is_ended.store(true, Ordering::SeqCst);
            let _ = event.fd.write(1);
        }
    }
}

/// Reads a whole log, or its last `tail` lines. Invalid UTF-8 is replaced. Use [`Consoles::follow`]
/// to read a log piece by piece.
pub fn read(dir: &Path, tail: Option<u64>) -> Result<String> {
    let io = |e| Error::io(format!("read the console log in {}", dir.display()), e);
    let mut reader = LogReader::open(dir, tail).map_err(io)?;
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; CHUNK_BYTES_MAX]);
    loop {
        match reader.read(&mut buffer).map_err(io)? {
            0 => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
            n => bytes.extend_from_slice(&buffer[..n]),
        }
    }
}

/// The result of [`Follower::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FollowerState {
    /// More output may be available. Call [`Follower::next_chunk`] until it returns None.
    More,
    Deadline,
    /// The VM has been deleted, so no more output will follow.
    Ended,
}

/// A position in a log that moves forward as the log grows.
pub struct Follower {
    shared: Arc<Shared>,
    dir: PathBuf,
    event: Arc<Event>,
    reader: Option<LogReader>,
    /// The beginning of a character that is not complete yet.
    partial: Vec<u8>,
}

impl Follower {
    /// Returns the next piece of the log, at most [`CHUNK_BYTES_MAX`] bytes of it. Returns None if
    /// there is no complete new character or no log yet. Blocks only for reads from the disk.
    pub fn next_chunk(&mut self) -> Result<Option<String>> {
        crate::locks::may_block("file access");
        // Reset the event before reading the log, so that later changes set it again. After the end
        // of the log, the event stays set.
        if !self.event.is_ended.load(Ordering::SeqCst) {
            let _ = self.event.fd.read();
        }
        if self.reader.is_none() && self.dir.exists() {
            let opened = LogReader::open(&self.dir, None);
            self.reader = Some(opened.map_err(|e| {
                Error::io(format!("read the console log in {}", self.dir.display()), e)
            })?);
        }
        let Some(reader) = &mut self.reader else {
            return Ok(None);
        };
        let mut bytes = std::mem::take(&mut self.partial);
        let kept = bytes.len();
        bytes.resize(CHUNK_BYTES_MAX, 0);
        let n = reader
            .read(&mut bytes[kept..])
            .map_err(|e| Error::io(format!("read the console log in {}", self.dir.display()), e))?;
        bytes.truncate(kept + n);
        self.partial = bytes.split_off(whole_characters(&bytes));
        Ok((!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Returns a descriptor for `poll`. It is readable if more output may be available, or if the
    /// VM has been deleted.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.fd.as_fd()
    }

    pub fn is_ended(&self) -> bool {
        self.event.is_ended.load(Ordering::SeqCst)
    }

    /// Waits until more output may be available, the VM has been deleted, or `deadline` has passed.
    /// Fails with `cancelled` when `cancel` fires.
    pub fn wait(&self, deadline: Instant, cancel: &Cancel) -> Result<FollowerState> {
        let doing = "follow a console log";
        match wait_any(&[(self.fd(), PollFlags::POLLIN)], deadline, cancel)
            .map_err(|e| Error::io(doing, e))?
        {
            WaitResult::Cancelled => Err(cancelled(doing, cancel)),
            WaitResult::Deadline => Ok(FollowerState::Deadline),
            WaitResult::Ready if self.is_ended() => Ok(FollowerState::Ended),
            WaitResult::Ready => Ok(FollowerState::More),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        if let Some(events) = state.followers.get_mut(&self.dir) {
            events.retain(|e| !Arc::ptr_eq(e, &self.event));
            if events.is_empty() {
                state.followers.remove(&self.dir);
            }
        }
    }
}

/// Returns the length of `bytes` without an incomplete UTF-8 character at the end.
pub(super) fn whole_characters(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(3);
    for i in (tail..bytes.len()).rev() {
        let need = match bytes[i] {
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            0x80..=0xBF => continue,
            _ => break,
        };
        return if bytes.len() - i < need {
            i
        } else {
            bytes.len()
        };
    }
    bytes.len()
}

struct Console {
    dir: PathBuf,
    from: File,
    vmm_log: Option<File>,
}

struct Log {
    writer: Option<LogWriter>,
    bytes_max: u64,
    /// The number of bytes that could not be written since the last successful write.
    lost: u64,
}

struct Reader {
    shared: Arc<Shared>,
    consoles: Vec<Console>,
    logs: HashMap<PathBuf, Log>,
    buffer: Vec<u8>,
    next_tick: Instant,
}

impl Reader {
    fn new(shared: Arc<Shared>) -> Self {
        let next_tick = Instant::now() + TICK;
        Self {
            shared,
            consoles: Vec::new(),
            logs: HashMap::default(),
            buffer: vec![0; CHUNK_BYTES_MAX],
            next_tick,
        }
    }

    fn run(mut self, inbox: &Inbox<Attach>) {
        loop {
            let ready = self.poll(inbox);
            // Iterate backwards, so that removing a console does not change the other indexes.
            for i in ready.into_iter().rev() {
                if !self.read_one(i) {
                    let gone = self.consoles.swap_remove(i);
                    self.shared.detach(&gone.dir);
                    if self.consoles.iter().all(|c| c.dir != gone.dir) {
                        self.logs.remove(&gone.dir);
                    }
                }
            }
            let Some(incoming) = inbox.take() else {
                return;
            };
            for console in incoming {
                self.begin(console);
            }
            if Instant::now() >= self.next_tick {
                self.next_tick = Instant::now() + TICK;
                self.consoles.iter().for_each(bound_vmm_log);
            }
        }
    }

    /// Waits until a console is ready, a console is attached, or the next tick is due. Returns the
    /// indexes of the consoles that are ready, or none after an error.
    fn poll(&self, inbox: &Inbox<Attach>) -> Vec<usize> {
        let deadline = (!self.consoles.is_empty()).then_some(self.next_tick);
        inbox.poll(self.consoles.iter().map(|c| c.from.as_fd()), deadline)
    }

    fn begin(&mut self, attach: Attach) {
        let log = self.logs.entry(attach.dir.clone()).or_insert(Log {
            writer: None,
            bytes_max: 0,
            lost: 0,
        });
        if log.bytes_max != attach.bytes_max {
            *log = Log {
                writer: None,
                bytes_max: attach.bytes_max,
                lost: log.lost,
            };
        }
        log.append(&attach.dir, Some(&attach.mark), &[]);
        self.shared.notify(&attach.dir);
        let vmm_log = open_dir(&attach.dir)
            .ok()
            .and_then(|dir| open_at(dir, VMM_LOG, OFlags::WRONLY, 0).ok());
        self.consoles.push(Console {
            dir: attach.dir,
            from: attach.from,
            vmm_log,
        });
    }

    /// Reads once from a console, and logs what it read. Returns false if the console has ended or
    /// cannot be read.
    fn read_one(&mut self, i: usize) -> bool {
        let console = &mut self.consoles[i];
        let n = match console.from.read(&mut self.buffer) {
            Ok(0) => return false,
            Ok(n) => n,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return true;
            }
            Err(_) => return false,
        };
        if let Some(log) = self.logs.get_mut(&console.dir) {
            log.append(&console.dir, None, &self.buffer[..n]);
        }
        self.shared.notify(&console.dir);
        true
    }
}

impl Log {
    /// Appends to the log. Bytes that cannot be written are dropped and counted, because a full
    /// disk must not block a guest.
    fn append(&mut self, dir: &Path, mark: Option<&str>, bytes: &[u8]) {
        if let Err(e) = self.try_append(dir, mark, bytes) {
            if self.lost == 0 {
                log::warn!("write the console log in {}: {e}", dir.display());
            }
            self.lost += bytes.len() as u64;
            self.writer = None;
        }
    }

    fn try_append(&mut self, dir: &Path, mark: Option<&str>, bytes: &[u8]) -> io::Result<()> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => none.insert(LogWriter::open(dir, self.bytes_max)?),
        };
        if self.lost > 0 {
            writer.append_mark(&format!("{} bytes could not be written", self.lost))?;
            self.lost = 0;
        }
        mark.map_or(Ok(()), |mark| writer.append_mark(mark))?;
        writer.append(bytes)
    }
}

fn bound_vmm_log(console: &Console) {
    crate::locks::may_block("file access");
    let Some(file) = &console.vmm_log else { return };
    if file.metadata().is_ok_and(|m| m.len() > VMM_LOG_BYTES_MAX)
        && let Err(e) = file.set_len(0)
    {
        log::warn!("truncate {VMM_LOG} in {}: {e}", console.dir.display());
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
