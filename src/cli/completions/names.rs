//! Names that the daemon knows, for completions.

use crate::api::image::ImageList;
use crate::api::kernel::KernelList;
use crate::api::op::{OpList, OpListRequest};
use crate::api::page::ListRequest;
use crate::api::snapshot::{SnapshotList, SnapshotListRequest};
use crate::api::vm::{VmBrief, VmListBrief, VmListRequest, VmState};
use crate::client::{Client, Result};
use crate::host::thread;
use clap_complete::engine::{CompletionCandidate, PathCompleter, ValueCompleter};
use crossbeam_channel::bounded;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

/// How long a shell waits for names. The daemon normally answers within a few milliseconds.
const DEADLINE: Duration = Duration::from_millis(500);

/// The names that complete an argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Source {
    Vms(Which),
    Images,
    Kernels,
    Snapshots,
    Operations {
        all: bool,
    },
    /// A term of `--filter`.
    Terms,
    /// A VM and a colon, or a path of this host.
    Places,
    Fixed(&'static [&'static str]),
}

/// The VMs that a verb can use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Which {
    Any,
    Running,
    NotRunning,
    /// Running VMs that are not paused.
    Unpaused,
    Paused,
    /// VMs with a VMM, which can be stopped.
    Alive,
}

impl Which {
    fn of(verb: &str) -> Self {
        match verb {
            "start" | "commit" => Which::NotRunning,
            "stop" | "restart" | "kill" => Which::Alive,
            "pause" => Which::Unpaused,
            "resume" => Which::Paused,
            "exec" | "ssh" | "connect" | "stats" | "top" | "metrics" | "balloon" | "fork"
            | "prepare" | "export" | "apply" | "status" | "ssh-config" | "cp" => Which::Running,
            _ => Which::Any,
        }
    }

    fn includes(self, vm: &VmBrief<'_>) -> bool {
        let running = vm.state == VmState::Running;
        match self {
            Which::Any => true,
            Which::Running => running,
            Which::NotRunning => {
                matches!(
                    vm.state,
                    VmState::Created | VmState::Stopped | VmState::Failed
                )
            }
            Which::Unpaused => running && !vm.paused,
            Which::Paused => running && vm.paused,
            Which::Alive => matches!(
                vm.state,
                VmState::Running | VmState::Starting | VmState::Stopping
            ),
        }
    }
}

impl Source {
    /// Returns the source for an argument of a verb.
    pub(super) fn of(verb: &str, argument: &str) -> Option<Self> {
        Some(match argument {
            // `snapshot create` needs a running VM. `vm create` has no argument of this name.
            "vm" if verb == "create" => Source::Vms(Which::Running),
            "vm" | "vms" => Source::Vms(Which::of(verb)),
            // `image commit` and `image pull` make a new image.
            "image" | "images" | "from" if !matches!(verb, "commit" | "pull" | "register") => {
                Source::Images
            }
            "kernel" => Source::Kernels,
            "snapshot" | "snapshots" => Source::Snapshots,
            "op" | "ops" => Source::Operations {
                all: verb == "show",
            },
            "filters" => Source::Terms,
            "paths" if verb == "cp" => Source::Places,
            "net" => Source::Fixed(&["nat", "none"]),
            "init" => Source::Fixed(&["fcd", "image"]),
            "state" => Source::Fixed(STATES),
            "history" => Source::Fixed(&["full", "none"]),
            _ => return None,
        })
    }
}

/// The states of VMs, as `vm wait --state` takes them.
const STATES: &[&str] = &[
    "created", "starting", "running", "stopping", "stopped", "deleting", "failed",
];
/// The keys that `--filter` accepts for VMs, each with its `=`.
const TERMS: &[&str] = &["label=", "state=", "name=", "image=", "id="];

/// A daemon that may not answer.
pub(super) struct Daemon {
    socket: PathBuf,
}

impl Daemon {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Returns the names that begin with `typed`, each with a description.
    pub(super) fn candidates(&self, source: Source, typed: &OsStr) -> Vec<CompletionCandidate> {
        if source == Source::Places && is_path(typed) {
            return PathCompleter::any().complete(typed);
        }
        let Some(text) = typed.to_str() else {
            return Vec::new();
        };
        let mut found = self.candidates_of(source, text);
        if source == Source::Places && !text.contains(':') {
            found.extend(PathCompleter::any().stdio().complete(typed));
        }
        found
    }

    fn candidates_of(&self, source: Source, typed: &str) -> Vec<CompletionCandidate> {
        let mut names = self.names(source, typed);
        names.retain(|name| name.name.starts_with(typed));
        names
            .into_iter()
            .map(|Name { name, about }| CompletionCandidate::new(name).help(about.map(Into::into)))
            .collect()
    }

    fn names(&self, source: Source, typed: &str) -> Vec<Name> {
        if let Source::Fixed(words) = source {
            return words.iter().map(|word| Name::bare(*word)).collect();
        }
        let (sender, receiver) = bounded(1);
        let (socket, typed) = (self.socket.clone(), typed.to_owned());
        let asked = thread::spawn("names", move || {
            // If the daemon is gone or busy, there are no candidates.
            let names = Client::connect_again(&socket)
                .and_then(|mut client| ask(&mut client, source, &typed));
            let _ = sender.send(names.unwrap_or_default());
        });
        match asked {
            Ok(_) => receiver.recv_timeout(DEADLINE).unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }
}

/// A name, and the description that a shell shows beside it.
struct Name {
    name: String,
    about: Option<String>,
}

impl Name {
    fn bare(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            about: None,
        }
    }

    fn new(name: impl ToString, about: impl Into<String>) -> Self {
        Self {
            name: name.to_string(),
            about: Some(about.into()),
        }
    }
}

/// True if a word of `cp` can only be a path of this host.
fn is_path(typed: &OsStr) -> bool {
    let typed = typed.as_encoded_bytes();
    matches!(typed.first(), Some(b'.' | b'/' | b'~'))
}

fn vms(client: &mut Client, which: Which) -> Result<Vec<VmBrief<'static>>> {
    let request = VmListRequest {
        all: which != Which::Running,
        brief: true,
        ..VmListRequest::default()
    };
    let mut vms = client.list::<VmListBrief>(request)?;
    vms.retain(|vm| which.includes(vm));
    Ok(vms)
}

/// Returns the terms of `--filter` that VMs match. Only the last of several terms is completed.
fn terms(vms: &[VmBrief<'_>], typed: &str) -> Vec<Name> {
    let (before, last) = match typed.rfind(',') {
        Some(comma) => typed.split_at(comma + 1),
        None => ("", typed),
    };
    let mut terms = BTreeSet::new();
    let Some((key, value)) = last.split_once('=') else {
        let begun = TERMS
            .iter()
            .map(|term| Name::bare(format!("{before}{term}")));
        return begun.collect();
    };
    match key {
        "label" => {
            for (label, its_value) in vms.iter().flat_map(|vm| vm.labels.iter()) {
                // Offer the values of a key only after its `=`, because there may be many.
                terms.insert(match value.contains('=') {
                    true => format!("{label}={its_value}"),
                    false => label.to_string(),
                });
            }
        }
        "state" | "status" => terms.extend(STATES.iter().map(ToString::to_string)),
        "name" => terms.extend(vms.iter().map(|vm| vm.name.to_string())),
        "image" | "ancestor" => terms.extend(vms.iter().map(|vm| vm.image.to_string())),
        "id" => terms.extend(vms.iter().map(|vm| vm.id.to_string())),
        _ => {}
    }
    let whole = terms.iter();
    let whole = whole.map(|term| Name::bare(format!("{before}{key}={term}")));
    whole.collect()
}

fn ask(client: &mut Client, source: Source, typed: &str) -> Result<Vec<Name>> {
    let every = ListRequest::default;
    let about = |vm: &VmBrief<'_>| format!("{}, {}", vm.state.name(), vm.image);
    Ok(match source {
        Source::Vms(which) => {
            let vms = vms(client, which)?;
            vms.iter()
                .map(|vm| Name::new(&*vm.name, about(vm)))
                .collect()
        }
        Source::Terms => terms(&vms(client, Which::Any)?, typed),
        Source::Places => {
            let vms = vms(client, Which::Running)?;
            let place = |vm: &VmBrief<'_>| Name::new(format!("{}:", vm.name), about(vm));
            vms.iter().map(place).collect()
        }
        Source::Images => {
            let images = client.list::<ImageList>(every())?;
            images
                .iter()
                .map(|image| Name::new(&image.name, image.os.clone()))
                .collect()
        }
        Source::Kernels => {
            let kernels = client.list::<KernelList>(every())?;
            kernels
                .iter()
                .map(|kernel| Name::new(&kernel.name, kernel.version.clone()))
                .collect()
        }
        Source::Snapshots => {
            let snapshots = client.list::<SnapshotList>(SnapshotListRequest::default())?;
            snapshots
                .iter()
                .map(|s| Name::new(&s.name, format!("of {}", s.vm_name)))
                .collect()
        }
        Source::Operations { all } => {
            let request = OpListRequest {
                all,
                ..OpListRequest::default()
            };
            let ops = client.list::<OpList>(request)?;
            ops.iter()
                .map(|op| Name::new(&op.id, op.method.clone()))
                .collect()
        }
        Source::Fixed(_) => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::syntax;
    use super::*;

    /// A renamed argument would lose its completions without an error.
    #[test]
    fn arguments_with_names_have_sources() {
        fn visit(command: &clap::Command, missing: &mut Vec<String>) {
            let verb = command.get_name();
            for arg in command.get_arguments() {
                let shown = arg.get_value_names().unwrap_or_default().first();
                let is_live = shown.is_some_and(|name| {
                    ["VM", "SNAPSHOT", "OP", "KERNEL", "IMAGE"].contains(&name.as_str())
                });
                if is_live && Source::of(verb, arg.get_id().as_str()).is_none() {
                    missing.push(format!("{verb} {}", arg.get_id()));
                }
            }
            command
                .get_subcommands()
                .for_each(|sub| visit(sub, missing));
        }
        let mut missing = Vec::new();
        let mut cli = syntax();
        cli.build();
        visit(&cli, &mut missing);
        assert_eq!(missing, [""; 0]);
    }
}
