//! `system uninstall`: removes a whole installation, after it has listed everything and asked.
//!
//! fcctl deletes the VMs one by one with ordinary operations, and can be interrupted between them.
//! Then the daemon exits and removes the rest itself, because only the daemon knows what it made
//! and has the rights to remove it.

use super::confirm::Question;
use super::connector::operate;
use super::context::Context;
use super::key_dir;
use super::output::size;
use super::printer::Printer;
use crate::api::Empty;
use crate::api::daemon::{
    Info, InfoReply, InstalledItem, Space, Uninstall, UninstallReply, UninstallRequest,
};
use crate::api::vm::{Vm, VmDelete, VmDeleteRequest, VmList, VmListRequest, VmState};
use crate::client::{Client, Failure, Result};
use crate::config::Places;
use crate::error::{Error, Kind};
use crate::host::plural::count;
use crate::host::text::printable;
use crate::host::wait::{WaitResult, wait_uncancelled};
use nix::poll::PollFlags;
use rustix::process::{Pid, PidfdFlags};
use serde::Serialize;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the daemon may take to exit and to remove its files. Large images take a while.
const EXIT_DEADLINE: Duration = Duration::from_secs(300);
/// The files that the Debian package owns.
const PACKAGE_FILES: &str = "var/lib/dpkg/info/fcd.list";
/// The files that a user copies from the repository to run root's daemon. fcd removes none of
/// them.
const COPIED: &[&str] = &[
    "etc/systemd/system/fcd.socket",
    "etc/systemd/system/fcd.service",
    "usr/local/bin/fcd",
    "usr/local/bin/fcctl",
];

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Only show what would be removed
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Do not ask for confirmation
    #[arg(short, long)]
    yes: bool,
    /// Also kill and delete running VMs
    #[arg(short, long)]
    force: bool,
}

/// Everything that an uninstallation removes, and its `--json` output.
#[derive(Debug, Serialize)]
struct Plan {
    removed: bool,
    vms: Vec<VmEntry>,
    /// The space that is freed.
    bytes: u64,
    items: Vec<InstalledItem>,
    /// The files that are kept, because fcd did not make them.
    kept: Vec<String>,
    #[serde(skip)]
    space: Vec<(&'static str, u64, u64)>,
}

#[derive(Debug, Serialize)]
struct VmEntry {
    name: String,
    state: VmState,
    #[serde(skip)]
    id: String,
}

impl Plan {
    fn new(client: &mut Client, fcd: &InfoReply, keys: Option<&Path>) -> Result<Self> {
        let UninstallReply {
            mut items,
            mut kept,
        } = client.call::<Uninstall>(&UninstallRequest { dry_run: true })?;
        if let Some(keys) = keys.filter(|dir| dir.exists()) {
            items.push(InstalledItem {
                kind: "directory".to_owned(),
                name: keys.display().to_string(),
            });
        }
        kept.extend(copied_files(fcd, Path::new("/")));
        let vms = client.list::<VmList>(VmListRequest {
            all: true,
            ..Default::default()
        })?;
        let space = client.call::<Space>(&Empty {})?.kinds;
        let space: Vec<_> = space
            .iter()
            .filter(|of| of.count > 0 || of.bytes > 0)
            .map(|of| (of.kind.title(), of.count, of.bytes))
            .collect();
        Ok(Self {
            removed: false,
            vms: vms.iter().map(entry).collect(),
            bytes: space.iter().map(|(_, _, bytes)| bytes).sum(),
            items,
            kept,
            space,
        })
    }

    fn running(&self) -> Vec<&str> {
        let runs = |vm: &&VmEntry| {
            matches!(
                vm.state,
                VmState::Starting | VmState::Running | VmState::Stopping
            )
        };
        let running = self.vms.iter().filter(runs);
        running.map(|vm| vm.name.as_str()).collect()
    }

    fn text(&self) -> String {
        let mut lines = Vec::new();
        for vm in &self.vms {
            lines.push(format!("VM {} ({})", vm.name, vm.state.name()));
        }
        for (what, count, bytes) in &self.space {
            lines.push(format!("{what}: {count}, {}", size(*bytes)));
        }
        for item in &self.items {
            lines.push(format!("{} {}", item.kind.replace('_', " "), item.name));
        }
        let indented = |lines: &[String]| -> String {
            let lines = lines.iter().map(|line| format!("  {}\n", printable(line)));
            lines.collect()
        };
        let mut text = format!("{}{} in all\n", indented(&lines), size(self.bytes));
        if !self.kept.is_empty() {
            text.push_str("to be kept, because fcd did not make it:\n");
            text.push_str(&indented(&self.kept));
        }
        text
    }
}

fn entry(vm: &Vm) -> VmEntry {
    VmEntry {
        name: vm.name.to_string(),
        state: vm.state,
        id: vm.id.to_string(),
    }
}

/// True for the system's daemon: it runs as root, with the default state directory.
fn is_system(fcd: &InfoReply) -> bool {
    let system = Places::for_user(0, &|_| None).state_dir;
    fcd.uid == 0 && Path::new(&fcd.state_dir) == system
}

/// Returns the files that were copied by hand for the system's daemon.
fn copied_files(fcd: &InfoReply, root: &Path) -> Vec<String> {
    if !is_system(fcd) {
        return Vec::new();
    }
    let config = Places::for_user(0, &|_| None).config;
    let config = config.strip_prefix("/").map(Path::to_owned);
    let paths = COPIED.iter().map(PathBuf::from).chain(config);
    let paths = paths.map(|path| root.join(path));
    let present = paths.filter(|path| path.symlink_metadata().is_ok());
    present.map(|path| path.display().to_string()).collect()
}

/// Fails if the Debian package installed the daemon, because purging the package removes more than
/// fcctl can.
fn require_no_package(fcd: &InfoReply, program: &Path, root: &Path) -> Result<()> {
    let list = std::fs::read_to_string(root.join(PACKAGE_FILES)).unwrap_or_default();
    // The kernel adds this suffix if an upgrade has replaced the program of the running daemon.
    let program = program.to_string_lossy();
    let program = program.trim_end_matches(" (deleted)");
    if !is_system(fcd) || !list.lines().any(|line| line == program) {
        return Ok(());
    }
    let text = "fcd was installed as a Debian package, so apt has to remove it";
    Err(Error::new(Kind::Conflict, text)
        .hint("apt purge fcd")
        .into())
}

pub(super) fn run(ctx: &mut Context, args: &Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        env,
        ..
    } = ctx;
    let mut client = connector.connect(printer)?;
    let fcd = client.call::<Info>(&Empty {})?;
    let program = std::fs::read_link(format!("/proc/{}/exe", fcd.pid)).unwrap_or_default();
    require_no_package(&fcd, &program, Path::new("/"))?;
    let keys = key_dir::of_daemon(env, connector.socket());
    let mut plan = Plan::new(&mut client, &fcd, keys.as_deref())?;
    if args.dry_run {
        match printer.json {
            true => printer.document(&plan)?,
            false => printer.text(&format!("would remove:\n{}", plan.text()))?,
        }
        return Ok(0);
    }
    require_stopped(&plan, args)?;
    if !printer.json {
        printer.text(&format!("to be removed:\n{}", plan.text()))?;
    }
    let question = Question {
        doing: "uninstall",
        text: "remove all of this? This cannot be undone".to_owned(),
        hint: "review the list (fcctl system uninstall --dry-run), then add --yes",
    };
    if !args.yes && !question.is_confirmed(printer, stdio)? {
        printer.note("nothing was removed");
        return Ok(1);
    }
    delete_vms(printer, &mut client, &plan, args.force)?;
    let daemon = pidfd(fcd.pid)?;
    client.call::<Uninstall>(&UninstallRequest::default())?;
    drop(client);
    await_exit(&daemon)?;
    if let Some(keys) = &keys {
        crate::host::fs::remove_tree(keys)
            .map_err(|e| Error::io(format!("remove {}", keys.display()), e))?;
    }
    plan.removed = true;
    finish(printer, &plan, &fcd)
}

fn require_stopped(plan: &Plan, args: &Args) -> Result<()> {
    let running = plan.running();
    if running.is_empty() || args.force {
        return Ok(());
    }
    let text = format!(
        "uninstall: {} running: {}",
        match running.len() {
            1 => "a VM is".to_owned(),
            n => format!("{} are", count(n as u64, "VM")),
        },
        running.join(", ")
    );
    let hint = format!(
        "shut down the guests: fcctl stop {}\nor kill them, too: add --force",
        running.join(" ")
    );
    Err(Error::new(Kind::WrongState, text).hint(hint).into())
}

fn delete_vms(printer: &Printer, client: &mut Client, plan: &Plan, force: bool) -> Result<()> {
    for vm in &plan.vms {
        let request = VmDeleteRequest {
            vm: vm.id.clone(),
            force,
            if_exists: true,
        };
        operate::<VmDelete>(printer, client, &format!("delete {}", vm.name), &request)?;
    }
    Ok(())
}

fn pidfd(pid: u32) -> Result<OwnedFd> {
    let doing = || format!("open process {pid} of fcd");
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Failure::from(Error::internal(doing())))?;
    let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
    fd.map_err(|e| Error::io(doing(), e).into())
}

fn await_exit(daemon: &OwnedFd) -> Result<()> {
    let exited = [(daemon.as_fd(), PollFlags::POLLIN)];
    let waited = wait_uncancelled(&exited, Instant::now() + EXIT_DEADLINE)
        .map_err(|e| Error::io("wait for fcd to exit", e))?;
    if waited == WaitResult::Ready {
        return Ok(());
    }
    let text = "uninstall: fcd has not exited in time";
    Err(Error::new(Kind::Timeout, text).hint("see its log").into())
}

/// Checks that the daemon has removed its files, and says what stays.
fn finish(printer: &mut Printer, plan: &Plan, fcd: &InfoReply) -> Result<u8> {
    let database = Path::new(&fcd.state_dir).join("fcd.db");
    if database.exists() {
        let text = format!("uninstall: fcd has left files in {}", fcd.state_dir);
        let hint = "its log says why: journalctl -u fcd, or fcd.log in that directory";
        return Err(Error::new(Kind::Host, text).hint(hint).into());
    }
    if printer.json {
        printer.document(plan)?;
        return Ok(0);
    }
    printer.line(&format!("removed fcd and {}", size(plan.bytes)))?;
    if plan.kept.iter().any(|path| path.ends_with("fcd.socket")) {
        printer.note("systemd starts fcd again as soon as somebody connects; to prevent that:");
        printer.note("systemctl disable --now fcd.socket fcd.service");
    }
    Ok(0)
}

#[cfg(test)]
#[path = "uninstall_tests.rs"]
mod tests;
