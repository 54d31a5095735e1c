//! Streams events: changes of VMs and ends of operations, in the form that the API reports them.
//!
//! A watch begins on its connection's own thread, which sends the snapshot or the missed events.
//! Once the watcher is up to date, the feeder's thread sends to it (`feeder.rs`). The connection's
//! thread takes over again when the socket is full and at the end of the watch.

use super::access::Caller;
use super::changes::events_for;
use super::core::Core;
use super::feeder::Feeder;
use super::feeder::Outlet;
use super::vm_view::view;
use super::waiting::{Gone, Hangup};
use crate::api::event::{Events, EventsWatchReply, EventsWatchRequest, Lagged, Snapshot};
use crate::api::frame::Note;
use crate::error::{Error, Kind, Result};
use crate::host::time::now_s;
use crate::store::{Next, Seen, Start, StoreChange};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The most VMs in a snapshot notification. With this limit, a notification fits into a frame even
/// if every VM has a long reason.
const VMS_PER_NOTE_MAX: usize = 128;

/// The connection of a watch.
pub trait WatchLine {
    fn hangup(&self) -> Hangup<'_>;
    /// Sends a notification, and waits if the caller reads slowly.
    ///
    /// # Errors
    /// Fails if the caller hung up or does not read. Fails with `InvalidData` if the notification
    /// is too long.
    fn send_note(&self, note: Note) -> io::Result<()>;
    /// Sends bytes that are already rendered, such as the rest of a line.
    fn send_bytes(&self, bytes: &[u8]) -> io::Result<()>;
    /// Returns the socket for the feeder. If this is `None`, everything is sent on the thread of
    /// the watch.
    fn socket(&self) -> Option<Arc<UnixStream>>;
}

/// Streams changes to watchers.
pub struct Watchers {
    pub(super) core: Core,
    pub(super) feeder: Feeder,
}

impl Watchers {
    /// Sends events until the caller hangs up or reads too slowly, or the daemon closes. A caller
    /// that reads too slowly gets the sequence number at which it can resume.
    pub fn watch_events(
        &self,
        caller: &Caller,
        request: &EventsWatchRequest,
        line: &dyn WatchLine,
    ) -> Result<EventsWatchReply> {
        let watcher = *caller;
        let (mut listening, start) = self
            .core
            .store
            .subscribe(request.since, move |uid| watcher.may_see(uid))?;
        let mut send = |note| line.send_note(note).map_err(send_error);
        match start {
            Start::Snapshot { seq, resync, vms } => send_snapshot(seq, resync, &vms, &mut send)?,
            Start::Missed(missed) => missed
                .iter()
                .try_for_each(|h| send_change(caller, h, &mut send))?,
        }
        let outlet = line
            .socket()
            .map(|socket| Arc::new(Outlet::new(watcher, socket)));
        let register = |outlet: &Arc<Outlet>| {
            self.feeder.register(
                &self.core.store,
                &self.core.closing,
                listening.id(),
                outlet.clone(),
            )
        };
        let registered = outlet.as_ref().and_then(register);
        if registered.is_some() {
            listening.lend();
        }
        loop {
            if let Some(rest) = outlet.as_ref().and_then(|outlet| outlet.take_unsent()) {
                line.send_bytes(rest.bytes()).map_err(send_error)?;
            }
            match listening.next() {
                Some(Next::Change(change)) => send_change(caller, &change, &mut send)?,
                Some(Next::Lagged {
                    dropped,
                    resume_seq,
                }) => {
                    send(Note::Lagged(Lagged {
                        dropped,
                        resume_seq,
                    }))?;
                    return Ok(EventsWatchReply { resume_seq });
                }
                None if self.core.closing.is_cancelled() => {
                    // Take the watch back if the feeder has it, because two threads must never
                    // write to one connection.
                    if listening.keep() {
                        continue;
                    }
                    return Err(
                        Error::new(Kind::ShuttingDown, "the daemon is shutting down")
                            .hint("run the command again once fcd runs"),
                    );
                }
                None => {
                    let waited = line
                        .hangup()
                        .wait(&[listening.fd(), self.core.closing.fd()], None);
                    listening.take_back();
                    waited?;
                }
            }
        }
    }
}

fn send_error(e: io::Error) -> Error {
    // `InvalidData` means that the notification is too long. Everything else is a hang-up.
    if e.kind() == io::ErrorKind::InvalidData {
        Error::internal("send a change to a watcher").with_source(e)
    } else {
        Gone.into()
    }
}

type Send<'a> = dyn FnMut(Note) -> Result<()> + 'a;

/// Sends the snapshot in as many notifications as it needs, at least one.
fn send_snapshot(seq: u64, resync: bool, vms: &[Seen], send: &mut Send<'_>) -> Result<()> {
    let at = now_s();
    let mut rest = vms;
    loop {
        let (now, later) = rest.split_at(rest.len().min(VMS_PER_NOTE_MAX));
        let vms = now
            .iter()
            .map(|seen| view(&seen.row, seen.workspace.as_deref()))
            .collect();
        send(Note::Snapshot(Snapshot {
            seq,
            at,
            resync,
            more: !later.is_empty(),
            vms,
        }))?;
        if later.is_empty() {
            return Ok(());
        }
        rest = later;
    }
}

fn send_change(caller: &Caller, change: &StoreChange, send: &mut Send<'_>) -> Result<()> {
    let events = events_for(caller, change)?;
    if events.is_empty() {
        Ok(())
    } else {
        send(Note::Events(Events {
            seq: change.seq,
            events,
        }))
    }
}
