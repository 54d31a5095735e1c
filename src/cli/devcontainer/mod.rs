//! `up` and `down`: start and stop the VM of a directory. A `devcontainer.json` may describe it.
//!
//! The repository may be hostile. Nothing that it asks for runs on this host, no file outside of
//! the project is read for it, and the guest gets none of the caller's variables unless
//! `--allow-env` names them. `up` shows what the file asks for, and asks the user to allow it, once
//! for each content.
//!
//! The VM is found by a label that holds the directory, so users may rename the VM. A VM of another
//! user is never used, because that user could then read the copy.

mod consent;
mod file;
mod parse;
mod scripts;
mod steps;
#[cfg(test)]
mod tests;
mod up;
mod variables;

use super::connector::operate;
use super::context::Context;
use super::transfer::PrepareHow;
use super::values::{Publish, parse_publish};
use super::vm_text::ended;
use crate::api::vm::{Vm, VmListBrief, VmListRequest, VmRequest, VmShow, VmStop, VmStopRequest};
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::workspace::plan::Plan;
use file::Project;
use std::path::PathBuf;
pub(super) use up::run as up;

#[derive(clap::Args, Debug)]
pub(super) struct UpArgs {
    /// Directory of the project
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Do what devcontainer.json asks for without asking first
    #[arg(short, long)]
    yes: bool,
    /// Publish a port of the VM, also of one that exists: [[ADDR:]HOST:]GUEST[/udp], or `auto` for
    /// whatever processes in the guest listen on
    #[arg(short, long, value_name = "PORT", value_parser = parse_publish)]
    publish: Vec<Publish>,
    /// Replace ${localEnv:NAME} with the value of your variable NAME, which the guest then gets
    #[arg(long, value_name = "NAME")]
    allow_env: Vec<String>,
    #[command(flatten)]
    workspace: PrepareHow,
}

#[derive(clap::Args, Debug)]
pub(super) struct DownArgs {
    /// Directory of the project
    #[arg(default_value = ".")]
    path: PathBuf,
}

/// Stops the VM of a directory.
pub(super) fn down(ctx: &mut Context, args: DownArgs) -> Result<u8> {
    let Context {
        connector, printer, ..
    } = ctx;
    let top = Plan::top_of(&args.path)?;
    let project = Project::find(&args.path, &top)?;
    let mut client = connector.connect(printer)?;
    let Some(vm) = find(&mut client, &project)? else {
        let text = format!("{} has no VM", project.dir.display());
        return Err(Error::new(Kind::VmNotFound, text)
            .hint("create one: fcctl up; list all VMs: fcctl ps -a")
            .into());
    };
    let request = VmStopRequest {
        vm: vm.id.to_string(),
        force: false,
        timeout_ms: None,
        keep: false,
    };
    let stopped =
        operate::<VmStop>(printer, &mut client, &format!("stop {}", vm.name), &request)?.vm;
    if printer.json {
        printer.document(&stopped)?;
    } else {
        printer.line(&ended(&stopped))?;
    }
    Ok(0)
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Returns the VM of a directory. Skips the VMs of other users, which root can see but must not
/// use. Returns the oldest VM, because a fork has the labels of its original.
fn find(client: &mut Client, project: &Project) -> Result<Option<Vm>> {
    let (key, value) = (file::label_key(), project.label());
    let request = VmListRequest {
        all: true,
        brief: true,
        ..VmListRequest::default()
    };
    let all = client.list::<VmListBrief>(request)?;
    for vm in all.iter().filter(|vm| vm.labels.get(&key) == Some(&value)) {
        let request = VmRequest {
            vm: vm.id.to_string(),
        };
        match client.call::<VmShow>(&request) {
            Ok(reply) if reply.vm.owner_uid == own_uid() => return Ok(Some(reply.vm)),
            Ok(_) => {}
            // Another process has deleted the VM since it was listed.
            Err(e) if e.is(Kind::VmNotFound) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}
