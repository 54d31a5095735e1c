//! The stream of events: rows that changed, told in the words of the wire.
//!
//! A watch begins on its connection's own thread, which sends the snapshot or what was missed. Once
//! the watcher has all there is, the feeder's one thread sends to it (`feeder.rs`). The
//! connection's thread goes on where the feeder cannot: when the socket is full, and at the end of
//! the watch.

use super::access::Caller;
use super::changes::events_for;
use super::core::{Core, now_s};
use super::feeder::Feeder;
use super::feeder::Outlet;
use super::vm_view::view;
use super::waiting::{Gone, Hangup};
use crate::api::event::{Events, EventsWatchReply, EventsWatchRequest, Lagged, Snapshot};
use crate::api::frame::Note;
use crate::error::{Error, Kind, Result};
use crate::store::{Happened, Next, Seen, Start};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// So that a snapshot's note fits a line whatever the reasons in it say.
const VMS_PER_NOTE_MAX: usize = 128;

/// The connection of a watch.
pub trait WatchLine {
    fn hangup(&self) -> Hangup<'_>;
    /// Sends a note, and waits for a caller who reads slowly.
    ///
    /// # Errors
    /// The caller has gone or does not read; `InvalidData` for a note that is too long.
    fn send_note(&self, note: Note) -> io::Result<()>;
    /// The same for bytes that are lines already.
    fn send_bytes(&self, bytes: &[u8]) -> io::Result<()>;
    /// Where the feeder sends to. Without it all is sent on the thread of the watch.
    fn socket(&self) -> Option<Arc<UnixStream>>;
}

/// Streams changes to watchers.
pub struct Watchers {
    pub(super) core: Core,
    pub(super) feeder: Feeder,
}

impl Watchers {
    /// Sends what happens until the caller goes, or reads too slowly: then it ends well, and says
    /// where to go on.
    pub fn watch_events(&self, caller: &Caller, request: &EventsWatchRequest, line: &dyn WatchLine) -> Result<EventsWatchReply> {
        let theirs = *caller;
        let (mut listening, start) = self.core.store.subscribe(request.since, move |uid| theirs.may_see(uid))?;
        let mut send = |note| line.send_note(note).map_err(unsent);
        match start {
            Start::Snapshot { seq, resync, vms } => tell_snapshot(seq, resync, &vms, &mut send)?,
            Start::Missed(missed) => missed.iter().try_for_each(|h| tell(caller, h, &mut send))?,
        }
        let outlet = line.socket().map(|socket| Arc::new(Outlet::new(theirs, socket)));
        let enter =
            |outlet: &Arc<Outlet>| self.feeder.enter(&self.core.store, &self.core.closing, listening.id(), outlet.clone());
        let entered = outlet.as_ref().and_then(enter);
        if entered.is_some() {
            listening.lend();
        }
        loop {
            if let Some(rest) = outlet.as_ref().and_then(|outlet| outlet.take_unsent()) {
                line.send_bytes(rest.bytes()).map_err(unsent)?;
            }
            match listening.next() {
                Some(Next::Happened(happened)) => tell(caller, &happened, &mut send)?,
                Some(Next::Lagged { dropped, resume_seq }) => {
                    send(Note::Lagged(Lagged { dropped, resume_seq }))?;
                    return Ok(EventsWatchReply { resume_seq });
                }
                None if self.core.closing.is_cancelled() => {
                    // Two threads must never write to one connection.
                    if listening.keep() {
                        continue;
                    }
                    return Err(Error::new(Kind::ShuttingDown, "the daemon is shutting down").hint("watch again when it is back"));
                }
                None => {
                    let woken = line.hangup().wait(&[listening.fd(), self.core.closing.fd()], None);
                    listening.take_back();
                    woken.map_err(|Gone| gone())?;
                }
            }
        }
    }
}

fn gone() -> Error {
    Error::new(Kind::Cancelled, "the caller went away")
}

fn unsent(e: io::Error) -> Error {
    // The connection's own word for a note that is too long; everything else is a hang-up.
    if e.kind() == io::ErrorKind::InvalidData { Error::internal("tell of a change").with_source(e) } else { gone() }
}

type Send<'a> = dyn FnMut(Note) -> Result<()> + 'a;

/// In as many notes as it takes, and at least one.
fn tell_snapshot(seq: u64, resync: bool, vms: &[Seen], send: &mut Send<'_>) -> Result<()> {
    let at = now_s();
    let mut rest = vms;
    loop {
        let (these, others) = rest.split_at(rest.len().min(VMS_PER_NOTE_MAX));
        let vms = these.iter().map(|seen| view(&seen.row, seen.workspace.as_deref())).collect();
        send(Note::Snapshot(Snapshot { seq, at, resync, more: !others.is_empty(), vms }))?;
        if others.is_empty() {
            return Ok(());
        }
        rest = others;
    }
}

fn tell(caller: &Caller, happened: &Happened, send: &mut Send<'_>) -> Result<()> {
    let events = events_for(caller, happened)?;
    if events.is_empty() { Ok(()) } else { send(Note::Events(Events { seq: happened.seq, events })) }
}
