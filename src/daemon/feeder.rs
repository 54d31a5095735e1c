//! Sends events to all watchers who keep up, from one thread.
//!
//! The store's feed gives this thread what has come for all of them. It renders the notes once for
//! each uid that sees something else, and sends them without waiting. A watcher whose socket is
//! full, and one whose connection is broken, goes back to its connection's own thread, which waits
//! for it, and ends the watch where that is due ([`super::events`]). So a watcher that reads slowly
//! costs the others one system call.

use super::access::Caller;
use super::changes::events_for;
use crate::api::event::Events;
use crate::api::frame::{Note, Notification};
use crate::api::limits::FRAME_BYTES_MAX;
use crate::host::wait::{WaitResult, wait_any};
use crate::locks::{Cancel, Mutex, Rank};
use crate::store::{Due, Feed, Happened, Store};
use nix::poll::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Notes that come together are sent together, up to so many bytes.
const BLOCK_BYTES_MAX: usize = 64 * 1024;
/// The thread looks around so often even when nothing comes.
const IDLE: Duration = Duration::from_secs(600);

/// Where the events of one watch go.
pub(super) struct Outlet {
    caller: Caller,
    socket: Arc<UnixStream>,
    unsent: Mutex<Option<Unsent>>,
}

/// The end of a block whose beginning the socket took: it goes before all that comes later.
pub(super) struct Unsent {
    block: Arc<[u8]>,
    sent: usize,
}

impl Unsent {
    pub fn bytes(&self) -> &[u8] {
        &self.block[self.sent..]
    }
}

impl Outlet {
    pub fn new(caller: Caller, socket: Arc<UnixStream>) -> Self {
        Self { caller, socket, unsent: Mutex::new(Rank::Connections, None) }
    }

    pub fn take_unsent(&self) -> Option<Unsent> {
        self.unsent.lock().take()
    }
}

type Outlets = Mutex<HashMap<u64, Arc<Outlet>>>;

/// The thread, and whom it sends to. It starts with the first watcher.
pub(super) struct Feeder {
    outlets: Arc<Outlets>,
    started: OnceLock<bool>,
}

/// A watcher is sent to as long as this lives.
pub(super) struct Entered<'a> {
    feeder: &'a Feeder,
    id: u64,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // Not under the lock: it may close a socket.
        let outlet = self.feeder.outlets.lock().remove(&self.id);
        drop(outlet);
    }
}

impl Feeder {
    pub fn new() -> Self {
        Self { outlets: Arc::new(Mutex::new(Rank::Connections, HashMap::new())), started: OnceLock::new() }
    }

    /// Registers the outlet of a subscription, which is then lent. `None` where the thread could
    /// not be started.
    pub fn enter(&self, store: &Store, closing: &Cancel, id: u64, outlet: Arc<Outlet>) -> Option<Entered<'_>> {
        if !self.started.get_or_init(|| self.start(store, closing)) {
            return None;
        }
        self.outlets.lock().insert(id, outlet);
        Some(Entered { feeder: self, id })
    }

    fn start(&self, store: &Store, closing: &Cancel) -> bool {
        let (outlets, closing) = (self.outlets.clone(), closing.clone());
        let started =
            store.feed().and_then(|feed| crate::host::thread::spawn("event-feed", move || run(feed, &outlets, &closing)));
        if let Err(e) = &started {
            log::warn!("each watcher has to serve itself: {e}");
        }
        started.is_ok()
    }
}

/// Until the daemon closes; then every watcher's own thread goes on.
fn run(mut feed: Feed, outlets: &Outlets, closing: &Cancel) {
    while !closing.is_cancelled() {
        let mut due = feed.take();
        if due.is_empty() {
            match wait_any(&[(feed.fd(), PollFlags::POLLIN)], Instant::now() + IDLE, closing) {
                Ok(WaitResult::Ready | WaitResult::Deadline) => continue,
                Ok(WaitResult::Cancelled) => return,
                Err(e) => return log::error!("wait for events: {e}"),
            }
        }
        if catch_unwind(AssertUnwindSafe(|| send_all(&mut due, outlets))).is_err() {
            log::error!("the thread that sends events panicked; each watcher serves itself now");
            due.iter_mut().for_each(|due| due.is_given_back = true);
            return feed.finish(due);
        }
        feed.finish(due);
    }
}

fn send_all(due: &mut [Due], outlets: &Outlets) {
    let found: Vec<_> = {
        let outlets = outlets.lock();
        due.iter().map(|due| outlets.get(&due.id).cloned()).collect()
    };
    let mut blocks = Blocks::default();
    for (due, outlet) in due.iter_mut().zip(found) {
        let Some(outlet) = outlet else {
            due.is_given_back = true;
            continue;
        };
        while !due.is_given_back && !due.changes.is_empty() {
            due.is_given_back = !send_some(due, &outlet, &mut blocks);
        }
    }
}

/// False when the watcher's own thread has to go on.
fn send_some(due: &mut Due, outlet: &Outlet, blocks: &mut Blocks) -> bool {
    let Some(block) = blocks.next(&outlet.caller, due) else { return false };
    let mut sent = 0;
    // Nothing of some changes is shown to some callers.
    if !block.bytes.is_empty() {
        match rustix::net::send(&*outlet.socket, &block.bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) => sent = n,
            Err(Errno::INTR) => return true,
            Err(_) => return false,
        }
    }
    due.changes.drain(..block.changes);
    if sent < block.bytes.len() {
        *outlet.unsent.lock() = Some(Unsent { block: block.bytes, sent });
        return false;
    }
    true
}

/// The notes of some changes in a row, as one who may see them gets them.
#[derive(Clone)]
struct Block {
    changes: usize,
    bytes: Arc<[u8]>,
}

/// What was rendered in this round. The queues of all callers who see the same are alike from the
/// same change on.
#[derive(Default)]
struct Blocks(HashMap<(Option<u32>, u64, usize), Option<Block>>);

impl Blocks {
    /// The first changes of `due`. None for what cannot be rendered.
    fn next(&mut self, caller: &Caller, due: &Due) -> Option<Block> {
        let sees_only = (caller.uid != 0).then_some(caller.uid);
        let first = due.changes.front()?.seq;
        let block = self.0.entry((sees_only, first, due.changes.len()));
        block.or_insert_with(|| render(caller, due.changes.iter())).clone()
    }
}

fn render<'a>(caller: &Caller, changes: impl Iterator<Item = &'a Arc<Happened>>) -> Option<Block> {
    let (mut count, mut bytes) = (0, Vec::new());
    for happened in changes {
        let events = events_for(caller, happened).ok()?;
        if !events.is_empty() {
            let line = Notification::line(Note::Events(Events { seq: happened.seq, events })).ok()?;
            if line.len() > FRAME_BYTES_MAX {
                // The watcher's own thread finds that, too, and ends the watch. What is before it
                // goes first.
                break;
            }
            bytes.extend_from_slice(&line);
        }
        count += 1;
        if bytes.len() >= BLOCK_BYTES_MAX {
            break;
        }
    }
    (count > 0).then(|| Block { changes: count, bytes: bytes.into() })
}
