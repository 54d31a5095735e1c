//! Reports, while `run` waits for its command, which ports the daemon forwards automatically
//! (`--publish auto`). A thread follows the VM's events over a connection of its own.

use super::vm_text::{forward_line, refused_line};
use crate::api::event::{EventsWatch, EventsWatchRequest, Members, What};
use crate::api::frame::Note;
use crate::api::port::AutoPorts;
use crate::api::vm::Vm;
use crate::client::{Client, Hangup, Result};
use crate::error::Error;
use crate::host::text::printable;
use crate::ids::{VmId, VmName};
use serde::Deserialize;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::thread::JoinHandle;

/// The thread that reports forwards. It ends when this is dropped.
pub(super) struct ForwardReporter {
    hangup: Hangup,
    thread: Option<JoinHandle<()>>,
}

impl ForwardReporter {
    /// Begins to report the forwards of a VM on `stderr`.
    pub(super) fn start(socket: &Path, stderr: &File, vm: &Vm) -> Result<Self> {
        let mut client = Client::connect_again(socket)?;
        let hangup = client.hangup()?;
        let stderr = stderr
            .try_clone()
            .map_err(|e| Error::io("duplicate stderr", e))?;
        let mut follower = Follower {
            id: vm.id.clone(),
            name: vm.name.clone(),
            last: AutoPorts::default(),
            seq: None,
        };
        let body = move || {
            // The command's terminal may be in raw mode, in which a line feed does not return to
            // the first column.
            let end = if stderr.is_terminal() { "\r\n" } else { "\n" };
            let print = |line: &str| {
                // If stderr cannot be written, there is nowhere left to report it.
                let text = format!("fcctl: {}{end}", printable(line));
                let _ = (&stderr).write_all(text.as_bytes());
            };
            // The call ends if this side was too slow. Any error means that the watch is over.
            loop {
                let request = EventsWatchRequest {
                    since: follower.seq,
                };
                let reply = client.call_more::<EventsWatch>(&request, &[], &mut |note| {
                    follower.note(note).iter().for_each(|line| print(line));
                    Ok(())
                });
                match reply {
                    Ok(reply) => follower.seq = Some(reply.resume_seq),
                    Err(_) => return,
                }
            }
        };
        Ok(Self {
            hangup,
            thread: Some(crate::host::thread::spawn("forwards", body)?),
        })
    }
}

impl Drop for ForwardReporter {
    fn drop(&mut self) {
        self.hangup.hang_up();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Finds in the daemon's notes what is new about the forwards of one VM.
struct Follower {
    id: VmId,
    name: VmName,
    last: AutoPorts,
    /// The last change that was read.
    seq: Option<u64>,
}

impl Follower {
    /// Returns the lines to print for a note.
    fn note(&mut self, note: Note) -> Vec<String> {
        match note {
            Note::Snapshot(snapshot) => {
                let vm = snapshot.vms.into_iter().find(|vm| vm.id == self.id);
                vm.map(|vm| self.news(vm.auto_ports.unwrap_or_default()))
                    .unwrap_or_default()
            }
            Note::Events(batch) => {
                let events = batch.events.into_iter();
                let own = events.filter(|event| event.vm.as_ref() == Some(&self.id));
                let sets: Vec<Members> = own
                    .filter_map(|event| match event.what {
                        What::Changed { set } | What::State { set, .. } => Some(set),
                        _ => None,
                    })
                    .collect();
                sets.iter().flat_map(|set| self.set(set)).collect()
            }
            _ => Vec::new(),
        }
    }

    fn set(&mut self, set: &Members) -> Vec<String> {
        let auto = set
            .get("auto_ports")
            .and_then(|value| Option::<AutoPorts>::deserialize(value).ok());
        auto.map(|auto| self.news(auto.unwrap_or_default()))
            .unwrap_or_default()
    }

    fn news(&mut self, now: AutoPorts) -> Vec<String> {
        let open = now.open.iter().filter(|p| !self.last.open.contains(p));
        let refused = now
            .refused
            .iter()
            .filter(|p| !self.last.refused.contains(p));
        let lines = open
            .map(|port| forward_line(&self.name, port))
            .chain(refused.map(|port| format!("VM {}: {}", self.name, refused_line(port))))
            .collect();
        self.last = now;
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::vm::VmState;
    use crate::cli::tests::vm;
    use serde_json::{Value, json};

    fn open(port: u16) -> Value {
        json!({"host_addr": "127.0.0.1", "host_port": port, "guest_port": port, "protocol": "tcp"})
    }

    fn changed(id: &VmId, auto: &Value) -> Note {
        let event = json!({"seq": 8, "at": 1, "vm": id, "name": "web", "owner_uid": 1,
            "event": "vm.changed", "set": {"auto_ports": auto}});
        Note::Events(serde_json::from_value(json!({"seq": 8, "events": [event]})).unwrap())
    }

    #[test]
    fn new_forwards_and_conflicts_are_reported_once() {
        let web = vm("web", VmState::Running);
        let (id, other) = (web.id.clone(), vm("db", VmState::Running).id);
        let mut follower = Follower {
            id: id.clone(),
            name: web.name,
            last: AutoPorts::default(),
            seq: None,
        };
        let mut check = |vm: &VmId, auto: Value, expected: &[&str]| {
            assert_eq!(follower.note(changed(vm, &auto)), expected);
        };
        let first = "forwarding 127.0.0.1:3000 to port 3000 of VM web";
        check(&id, json!({"open": [open(3000)], "refused": []}), &[first]);
        let taken = json!({"guest_port": 8080, "cause": "conflict", "reason": "port 127.0.0.1:8080/tcp is in use"});
        let both = json!({"open": [open(3000)], "refused": [taken]});
        let conflict = "VM web: port 8080 is not forwarded: port 127.0.0.1:8080/tcp is in use";
        check(&id, both.clone(), &[conflict]);
        check(&id, both.clone(), &[]);
        check(&other, json!({"open": [open(4000)], "refused": []}), &[]);
        check(&id, Value::Null, &[]);
        check(&id, both, &[first, conflict]);
    }
}
