//! The stream of events: rows that changed, told in the words of the wire.
//!
//! A watch begins on its connection's own thread, which sends the snapshot or what was missed. Once the watcher has all
//! there is, the feeder's one thread sends to it (`feeder.rs`). The connection's thread goes on where the feeder cannot:
//! when the socket is full, and at the end of the watch.

use super::access::view;
use super::feeder::Outlet;
use super::waiting::{Gone, Hangup};
use super::{Caller, Daemon, now_s, to_value};
use crate::api::event::{Event, Events, EventsWatchReply, EventsWatchRequest, Lagged, Members, Snapshot, What};
use crate::api::frame::Note;
use crate::error::{Error, Kind, Result};
use crate::store::{Happened, Next, OpEnd, Seen, Start, VmChange};
use serde_json::Value;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// So that a snapshot's note fits a line whatever the reasons in it say.
const VMS_PER_NOTE_MAX: usize = 128;
/// Members of a VM that its owner sets, beside its workspace. The others come and go with its state.
const SETTINGS: [&str; 8] = ["name", "image", "vcpus", "mem_mib", "disk_bytes", "pending", "rm", "workspace"];

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

impl Daemon {
    /// Sends what happens until the caller goes, or reads too slowly: then it ends well, and says where to go on.
    pub fn watch_events(&self, caller: &Caller, request: &EventsWatchRequest, line: &dyn WatchLine) -> Result<EventsWatchReply> {
        let theirs = *caller;
        let (mut listening, start) = self.store.subscribe(request.since, move |uid| theirs.may_see(uid))?;
        let mut send = |note| line.send_note(note).map_err(unsent);
        match start {
            Start::Snapshot { seq, resync, vms } => tell_snapshot(seq, resync, &vms, &mut send)?,
            Start::Missed(missed) => missed.iter().try_for_each(|h| tell(caller, h, &mut send))?,
        }
        let outlet = line.socket().map(|socket| Arc::new(Outlet::new(theirs, socket)));
        let enter = |outlet: &Arc<Outlet>| self.feeder.enter(&self.store, &self.closing, listening.id(), outlet.clone());
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
                None if self.closing.is_cancelled() => {
                    // Two threads must never write to one connection.
                    if listening.keep() {
                        continue;
                    }
                    return Err(Error::new(Kind::ShuttingDown, "the daemon is shutting down").hint("watch again when it is back"));
                }
                None => {
                    let woken = line.hangup().wait(&[listening.fd(), self.closing.fd()], None);
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

/// What the caller may see of a change.
pub(super) fn events_for(caller: &Caller, happened: &Happened) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    for change in happened.vms.iter().filter(|c| c.owner_uid().is_some_and(|uid| caller.may_see(uid))) {
        let Some(seen) = change.after.as_ref().or(change.before.as_ref()) else { continue };
        let (vm, name) = (Some(seen.row.id.clone()), Some(seen.row.name.clone()));
        let (seq, at, owner_uid) = (happened.seq, happened.at, seen.row.owner_uid);
        let event = |what| Event { seq, at, vm: vm.clone(), name: name.clone(), owner_uid, what };
        events.extend(of_vm(change)?.into_iter().map(event));
    }
    for end in happened.ended.iter().filter(|end| end.owners().any(|uid| caller.may_see(uid))) {
        events.push(Event {
            seq: happened.seq,
            at: happened.at,
            vm: end.vm.as_ref().map(|row| row.id.clone()),
            name: end.vm.as_ref().map(|row| row.name.clone()),
            owner_uid: end.vm.as_ref().map_or(end.owner_uid, |row| row.owner_uid),
            what: ended(end),
        });
    }
    Ok(events)
}

fn of_vm(change: &VmChange) -> Result<Vec<What>> {
    let (before, after) = match (&change.before, &change.after) {
        (None, None) => return Ok(vec![]),
        (None, Some(after)) => return Ok(vec![What::Created { set: members(after)? }]),
        (Some(before), None) => return Ok(vec![What::Deleted { op: before.row.op.clone() }]),
        (Some(before), Some(after)) => (before, after),
    };
    let was = members(before)?;
    let mut set: Members = members(after)?.into_iter().filter(|(name, value)| was.get(name) != Some(value)).collect();
    let mut events = Vec::new();
    let (from, to) = (before.row.state, after.row.state);
    if from != to || before.row.reason != after.row.reason {
        let (settings, others) = set.into_iter().partition(|(name, _)| SETTINGS.contains(&name.as_str()));
        set = settings;
        let op = after.row.op.clone().or_else(|| before.row.op.clone());
        events.push(What::State { from, to, reason: after.row.reason.clone(), op, set: others });
    }
    if !set.is_empty() {
        events.push(What::Changed { set });
    }
    Ok(events)
}

fn members(seen: &Seen) -> Result<Members> {
    match to_value(&view(&seen.row, seen.workspace.as_deref()))? {
        Value::Object(members) => Ok(members),
        other => Err(Error::internal(format!("a VM is no JSON object but {other}"))),
    }
}

fn ended(end: &OpEnd) -> What {
    What::OpEnded { op: end.id.clone(), method: end.method.clone(), state: end.state, error: end.error.clone() }
}
