//! Sends events to all watchers that keep up, from one thread.
//!
//! The thread takes new changes for all watchers from the store's feed. It renders the
//! notifications once for callers that see the same events, and sends them without waiting. If a
//! watcher's socket is full or broken, its watch is returned to the thread of its connection, which
//! waits for the socket or ends the watch ([`super::events`]). So a slow watcher costs the others
//! one system call.

use super::access::Caller;
use super::changes::events_for;
use crate::api::event::Events;
use crate::api::frame::{Note, Notification};
use crate::api::limits::FRAME_BYTES_MAX;
use crate::host::wait::{WaitResult, wait_any};
use crate::locks::{Cancel, Mutex, Rank};
use crate::sched::{HashMap, Instant, OnceLock};
use crate::store::{Due, Feed, Store, StoreChange};
use nix::poll::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// The size at which a block of notifications is full. Notifications that are due at the same time
/// are sent as one block.
const BLOCK_BYTES_MAX: usize = 64 * 1024;
/// How often the thread wakes up if nothing happens.
const IDLE: Duration = Duration::from_secs(600);

/// The destination of the events of one watch.
pub(super) struct Outlet {
    caller: Caller,
    socket: Arc<UnixStream>,
    unsent: Mutex<Option<Unsent>>,
}

/// The rest of a block that the socket took only in part. It must be sent before all later blocks.
pub(super) struct Unsent {
    block: Arc<[u8]>,
    sent: usize,
}

impl Unsent {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.block[self.sent..]
    }
}

impl Outlet {
    pub(super) fn new(caller: Caller, socket: Arc<UnixStream>) -> Self {
        Self {
            caller,
            socket,
            unsent: Mutex::new(Rank::Connections, None),
        }
    }

    pub(super) fn take_unsent(&self) -> Option<Unsent> {
        self.unsent.lock().take()
    }
}

type Outlets = Mutex<HashMap<u64, Arc<Outlet>>>;

/// The thread and the watchers that it sends to. The thread starts with the first watcher.
pub(super) struct Feeder {
    outlets: Arc<Outlets>,
    started: OnceLock<bool>,
}

/// The registration of an outlet with the thread. It ends when this is dropped.
pub(super) struct Registered<'a> {
    feeder: &'a Feeder,
    id: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        // Drop the outlet outside the lock, because that may close a socket.
        let outlet = self.feeder.outlets.lock().remove(&self.id);
        drop(outlet);
    }
}

impl Feeder {
    pub(super) fn new() -> Self {
        Self {
            outlets: Arc::new(Mutex::new(Rank::Connections, HashMap::default())),
            started: OnceLock::new(),
        }
    }

    /// Registers the outlet of a subscription. The caller then lends the subscription to the
    /// thread. Returns `None` if the thread could not be started.
    pub(super) fn register(
        &self,
        store: &Store,
        closing: &Cancel,
        id: u64,
        outlet: Arc<Outlet>,
    ) -> Option<Registered<'_>> {
        if !self.started.get_or_init(|| self.start(store, closing)) {
            return None;
        }
        self.outlets.lock().insert(id, outlet);
        Some(Registered { feeder: self, id })
    }

    fn start(&self, store: &Store, closing: &Cancel) -> bool {
        let (outlets, closing) = (self.outlets.clone(), closing.clone());
        let started = store.feed().and_then(|feed| {
            crate::host::thread::spawn("event-feed", move || run(feed, &outlets, &closing))
        });
        if let Err(e) = &started {
            log::warn!("start the event thread: {e}; each watcher uses its own thread");
        }
        started.is_ok()
    }
}

/// Runs until the daemon closes or an error ends the thread. Then the watchers continue on their
/// own threads.
fn run(mut feed: Feed, outlets: &Outlets, closing: &Cancel) {
    while !closing.is_cancelled() {
        let mut due = feed.take();
        if due.is_empty() {
            match wait_any(
                &[(feed.fd(), PollFlags::POLLIN)],
                Instant::now() + IDLE,
                closing,
            ) {
                Ok(WaitResult::Ready | WaitResult::Deadline) => continue,
                Ok(WaitResult::Cancelled) => return,
                Err(e) => return log::error!("wait for events: {e}"),
            }
        }
        if catch_unwind(AssertUnwindSafe(|| send_all(&mut due, outlets))).is_err() {
            log::error!("the event thread panicked; each watcher now uses its own thread");
            due.iter_mut().for_each(|due| due.is_returned = true);
            return feed.finish(due);
        }
        feed.finish(due);
    }
}

fn send_all(due: &mut [Due], outlets: &Outlets) {
    let found: Vec<_> = {
        let outlets = outlets.lock();
        due.iter()
            .map(|due| outlets.get(&due.id).cloned())
            .collect()
    };
    let mut blocks = Blocks::default();
    for (due, outlet) in due.iter_mut().zip(found) {
        let Some(outlet) = outlet else {
            due.is_returned = true;
            continue;
        };
        while !due.is_returned && !due.changes.is_empty() {
            due.is_returned = !send_some(due, &outlet, &mut blocks);
        }
    }
}

/// Sends one block to a watcher. Returns false if the watch must be returned to the thread of its
/// connection.
fn send_some(due: &mut Due, outlet: &Outlet, blocks: &mut Blocks) -> bool {
    let Some(block) = blocks.next(&outlet.caller, due) else {
        return false;
    };
    let mut sent = 0;
    // The block has no bytes if its changes have no events for this caller.
    if !block.bytes.is_empty() {
        match rustix::net::send(
            &*outlet.socket,
            &block.bytes,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        ) {
            Ok(n) => sent = n,
            Err(Errno::INTR) => return true,
            Err(_) => return false,
        }
    }
    due.changes.drain(..block.changes);
    if sent < block.bytes.len() {
        *outlet.unsent.lock() = Some(Unsent {
            block: block.bytes,
            sent,
        });
        return false;
    }
    true
}

/// The notifications of several consecutive changes, as one kind of caller sees them.
#[derive(Clone)]
struct Block {
    changes: usize,
    bytes: Arc<[u8]>,
}

/// The blocks that were rendered in this round. Callers that see the same events and whose queues
/// begin with the same change share them.
#[derive(Default)]
struct Blocks(HashMap<(Option<u32>, u64, usize), Option<Block>>);

impl Blocks {
    /// Returns a block with the first changes of `due`, or `None` if they cannot be rendered.
    fn next(&mut self, caller: &Caller, due: &Due) -> Option<Block> {
        let sees_only = (caller.uid != 0).then_some(caller.uid);
        let first = due.changes.front()?.seq;
        let block = self.0.entry((sees_only, first, due.changes.len()));
        block
            .or_insert_with(|| render(caller, due.changes.iter()))
            .clone()
    }
}

fn render<'a>(
    caller: &Caller,
    changes: impl Iterator<Item = &'a Arc<StoreChange>>,
) -> Option<Block> {
    let (mut count, mut bytes) = (0, Vec::new());
    for change in changes {
        let events = events_for(caller, change).ok()?;
        if !events.is_empty() {
            let line = Notification::line(Note::Events(Events {
                seq: change.seq,
                events,
            }))
            .ok()?;
            if line.len() > FRAME_BYTES_MAX {
                // The frame is too large. Send the changes before it. The watcher's own thread will
                // get the same error and end the watch.
                break;
            }
            bytes.extend_from_slice(&line);
        }
        count += 1;
        if bytes.len() >= BLOCK_BYTES_MAX {
            break;
        }
    }
    (count > 0).then(|| Block {
        changes: count,
        bytes: bytes.into(),
    })
}
