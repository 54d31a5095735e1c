//! A caller that watches events, and builds the state of all VMs from them alone.

use crate::client::Failure;
use crate::world::World;
use fcd::testing::api::event::{Event, EventsWatch, EventsWatchRequest, What};
use fcd::testing::api::frame::Note;
use fcd::testing::api::vm::VmState;
use fcd::testing::sched::sim;
use fcd::testing::sched::{Instant, Mutex};
use fcd::testing::store::memory;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// The state of all VMs as the events tell it.
#[derive(Default)]
pub struct Mirror {
    pub seq: u64,
    vms: BTreeMap<String, VmState>,
    in_snapshot: bool,
    is_over: bool,
}

impl Mirror {
    /// Compares with the VMs that the daemon has.
    pub fn check(&self, vms: &BTreeMap<String, VmState>) -> Result<(), String> {
        if self.vms == *vms {
            return Ok(());
        }
        Err(format!(
            "the events describe {:?} after change {}, but the daemon has {vms:?}",
            self.vms, self.seq
        ))
    }

    fn note(&mut self, note: Note) -> Result<(), String> {
        match note {
            Note::Snapshot(snapshot) => {
                if !std::mem::replace(&mut self.in_snapshot, snapshot.more) {
                    self.vms.clear();
                }
                self.seq = snapshot.seq;
                let of = |vm: fcd::testing::api::vm::Vm| (vm.id.to_string(), vm.state);
                self.vms.extend(snapshot.vms.into_iter().map(of));
            }
            Note::Events(events) => {
                if events.seq <= self.seq {
                    return Err(format!("change {} was sent after {}", events.seq, self.seq));
                }
                self.seq = events.seq;
                for event in &events.events {
                    self.event(event).map_err(|e| format!("{e}: {event:?}"))?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), &'static str> {
        let id = event.vm.as_ref().map(ToString::to_string);
        let id = id.unwrap_or_default();
        match &event.what {
            What::Created { set } => {
                let state = serde_json::from_value(set["state"].clone());
                let state = state.map_err(|_| "a VM without a state")?;
                if self.vms.insert(id, state).is_some() {
                    return Err("created twice");
                }
            }
            What::State { from, to, .. } => match self.vms.get_mut(&id) {
                Some(state) if state == from => *state = *to,
                _ => return Err("an event is missing before this one"),
            },
            What::Deleted { .. } => {
                self.vms.remove(&id).ok_or("deleted twice")?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Watches until [`end`] is called. Connects again when the daemon is killed.
pub fn watch(world: &Arc<World>, mirror: &Mutex<Mirror>) {
    let dir = &world.config.state_dir;
    while !mirror.lock().is_over {
        let since = Some(mirror.lock().seq).filter(|seq| *seq > 0);
        let mut client = world.client(0);
        let begun = client.send::<EventsWatch>(&EventsWatchRequest { since }, true, None, &[]);
        let mut on_note = |note| {
            let mut mirror = mirror.lock();
            if let Err(why) = mirror.note(note) {
                sim::fail(&why);
            }
            if memory::seq(dir) < mirror.seq {
                sim::fail(&format!(
                    "change {} was sent before it is durable",
                    mirror.seq
                ));
            }
        };
        let far = Instant::now() + Duration::from_secs(100_000);
        let ended = begun.and_then(|()| client.reply_until::<EventsWatch>(far, &mut on_note));
        if let Err(Failure::Fault(fault)) = ended
            && fault.kind != "shutting_down"
        {
            sim::fail(&format!("events.watch: {fault:?}"));
        }
    }
}

/// Makes the watcher end with its connection.
pub fn end(mirror: &Mutex<Mirror>) {
    mirror.lock().is_over = true;
}
