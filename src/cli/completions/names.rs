//! Names that the daemon knows, for completions.

use crate::api::image::ImageList;
use crate::api::kernel::KernelList;
use crate::api::op::{OpList, OpListRequest};
use crate::api::page::ListRequest;
use crate::api::snapshot::{SnapshotList, SnapshotListRequest};
use crate::api::vm::{VmBrief, VmListBrief, VmListRequest, VmState};
use crate::client::{Client, Result};
use crate::host::thread;
use clap_complete::engine::CompletionCandidate;
use crossbeam_channel::bounded;
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
    Operations { all: bool },
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
            | "prepare" | "export" | "apply" | "status" => Which::Running,
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
        const STATES: &[&str] = &[
            "created", "starting", "running", "stopping", "stopped", "deleting", "failed",
        ];
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
            "net" => Source::Fixed(&["nat", "none"]),
            "init" => Source::Fixed(&["fcd", "image"]),
            "state" => Source::Fixed(STATES),
            "history" => Source::Fixed(&["full", "none"]),
            _ => return None,
        })
    }
}

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
        let Some(typed) = typed.to_str() else {
            return Vec::new();
        };
        let mut names = self.names(source);
        names.retain(|name| name.name.starts_with(typed));
        names
            .into_iter()
            .map(|Name { name, about }| CompletionCandidate::new(name).help(about.map(Into::into)))
            .collect()
    }

    fn names(&self, source: Source) -> Vec<Name> {
        if let Source::Fixed(words) = source {
            return words.iter().map(|word| Name::bare(*word)).collect();
        }
        let (sender, receiver) = bounded(1);
        let socket = self.socket.clone();
        let asked = thread::spawn("names", move || {
            // If the daemon is gone or busy, there are no candidates.
            let names =
                Client::connect_again(&socket).and_then(|mut client| ask(&mut client, source));
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

fn ask(client: &mut Client, source: Source) -> Result<Vec<Name>> {
    let every = ListRequest::default;
    Ok(match source {
        Source::Vms(which) => {
            let request = VmListRequest {
                all: which != Which::Running,
                brief: true,
                ..VmListRequest::default()
            };
            let vms = client.list::<VmListBrief>(request)?;
            let wanted = vms.iter().filter(|vm| which.includes(vm));
            wanted
                .map(|vm| Name::new(&*vm.name, format!("{}, {}", vm.state.name(), vm.image)))
                .collect()
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
