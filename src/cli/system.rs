//! `info` and `system`: show fcd as a whole and the space that it uses, and free space.

use super::confirm::Question;
use super::connector::{Connector, operate};
use super::context::{Context, Stdio};
use super::output::{self, size, span};
use super::printer::Printer;
use super::uninstall;
use crate::api::Empty;
use crate::api::daemon::{Info, InfoReply, Space, SpaceKind, SpaceUse};
use crate::api::image::{
    ImageDelete, ImagePrune, ImagePruneReply, ImagePruneRequest, ImageRequest,
};
use crate::api::vm::{Vm, VmDelete, VmDeleteRequest, VmList, VmListBrief, VmListRequest, VmState};
use crate::client::{Client, Failure, Result};
use crate::error::Error;
use crate::host::plural::count;
use serde::Serialize;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Show the space that VMs, images, caches and snapshots use
    Df,
    /// Remove what nothing uses: cached layers and guest runtimes and, on request, images and
    /// stopped VMs. Lists everything and asks first
    Prune(PruneArgs),
    /// Show versions, drivers, VMs by state and the space in use
    Info,
    /// Remove this installation: all VMs, images and networks, and the daemon's files. Shows a list
    /// and asks before
    Uninstall(uninstall::Args),
}

#[derive(clap::Args, Debug)]
pub(super) struct PruneArgs {
    /// Also remove your images that no VM and no snapshot uses
    #[arg(short, long)]
    all: bool,
    /// Also delete your VMs that do not run, with their disks
    #[arg(long)]
    vms: bool,
    /// Only show what would be removed
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Do not ask for confirmation
    #[arg(short, long, visible_alias = "yes")]
    force: bool,
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        ..
    } = ctx;
    match verb {
        Verb::Df => df(connector, printer),
        Verb::Prune(args) => prune(connector, printer, stdio, &args),
        Verb::Info => info(connector, printer),
        Verb::Uninstall(args) => uninstall::run(ctx, &args),
    }
}

fn df(connector: &mut Connector, printer: &mut Printer) -> Result<u8> {
    let kinds = connector.connect(printer)?.call::<Space>(&Empty {})?.kinds;
    if printer.json {
        printer.document(&kinds)?;
        return Ok(0);
    }
    let row = |of: &SpaceUse| {
        vec![
            of.kind.title().to_owned(),
            of.count.to_string(),
            active(of).map_or_else(|| "-".to_owned(), |n| n.to_string()),
            size(of.bytes),
            size(of.reclaimable_bytes),
        ]
    };
    let rows: Vec<_> = kinds.iter().map(row).collect();
    let headers = ["TYPE", "COUNT", "ACTIVE", "SIZE", "RECLAIMABLE"];
    printer.text(&output::table(&headers, &rows))?;
    Ok(0)
}

/// Returns how many objects are in use. Cached layers are never in use, because images do not need
/// them.
fn active(of: &SpaceUse) -> Option<u64> {
    (of.kind != SpaceKind::Layers).then_some(of.active)
}

/// The `--json` output of `info`.
#[derive(Serialize)]
struct Overview {
    fcctl: &'static str,
    fcd: InfoReply,
    vms: Vec<StateCount>,
    space: Vec<SpaceUse>,
}

#[derive(Serialize)]
struct StateCount {
    state: VmState,
    count: usize,
}

fn info(connector: &mut Connector, printer: &mut Printer) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    let fcd = client.call::<Info>(&Empty {})?;
    let vms = client.list::<VmListBrief>(VmListRequest {
        all: true,
        brief: true,
        ..Default::default()
    })?;
    let in_state = |state: VmState| StateCount {
        state,
        count: vms.iter().filter(|vm| vm.state == state).count(),
    };
    let mut states: Vec<_> = VmState::ALL.into_iter().map(in_state).collect();
    states.retain(|of| of.count > 0);
    let overview = Overview {
        fcctl: env!("CARGO_PKG_VERSION"),
        fcd,
        vms: states,
        space: client.call::<Space>(&Empty {})?.kinds,
    };
    if printer.json {
        printer.document(&overview)?;
        return Ok(0);
    }
    let socket = connector.socket().display().to_string();
    printer.text(&sheet(&overview, &socket))?;
    Ok(0)
}

fn sheet(of: &Overview, socket: &str) -> String {
    let fcd = &of.fcd;
    let mut lines = vec![
        ("fcctl", of.fcctl.to_owned()),
        (
            "fcd",
            format!(
                "{}, pid {}, uid {}, up {}",
                fcd.version,
                fcd.pid,
                fcd.uid,
                span(fcd.uptime_s)
            ),
        ),
        ("socket", socket.to_owned()),
        ("state", fcd.state_dir.clone()),
        ("driver", fcd.driver.clone()),
        ("network", fcd.network.clone()),
        (
            "root disks",
            fcd.disk_driver.clone().unwrap_or_else(|| "none".to_owned()),
        ),
    ];
    for kind in &of.space {
        let what = match kind.kind {
            SpaceKind::Vms => by_state(&of.vms),
            _ => match active(kind) {
                Some(active) => format!("{}, {active} in use", kind.count),
                None => kind.count.to_string(),
            },
        };
        lines.push((kind.kind.title(), format!("{what}, {}", size(kind.bytes))));
    }
    let line = |(name, value): &(&str, String)| {
        let value = crate::host::text::printable(value);
        format!("{name:<15} {value}\n")
    };
    lines.iter().map(line).collect()
}

fn by_state(states: &[StateCount]) -> String {
    let total: usize = states.iter().map(|of| of.count).sum();
    let each = states
        .iter()
        .map(|of| format!("{} {}", of.count, of.state.name()));
    match total {
        0 => "0".to_owned(),
        total => format!("{total} ({})", each.collect::<Vec<_>>().join(", ")),
    }
}

/// The objects that a prune removes or has removed. This is also the `--json` output.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Plan {
    vms: Vec<String>,
    images: Vec<String>,
    runtimes: Vec<String>,
    /// The number of cached layers.
    layers: u64,
    bytes: u64,
    #[serde(skip)]
    vm_ids: Vec<String>,
    /// The total space, including that of objects that stay.
    #[serde(skip)]
    total_bytes: u64,
}

impl Plan {
    /// Finds what a prune would remove. The daemon lists only what the caller may remove.
    fn new(client: &mut Client, args: &PruneArgs) -> Result<Self> {
        let mut plan = Self::default();
        let vms = if args.vms {
            stopped_vms(client)?
        } else {
            vec![]
        };
        for vm in vms {
            plan.vms.push(vm.name.to_string());
            plan.vm_ids.push(vm.id.to_string());
        }
        for of in client.call::<Space>(&Empty {})?.kinds {
            plan.total_bytes += of.bytes;
            let is_meant = match of.kind {
                SpaceKind::Vms => args.vms,
                SpaceKind::Images => {
                    let names = Some(of.reclaimable).filter(|_| args.all);
                    plan.images = names.unwrap_or_default();
                    args.all
                }
                SpaceKind::Layers => {
                    plan.layers = if of.reclaimable_bytes > 0 {
                        of.count
                    } else {
                        0
                    };
                    true
                }
                SpaceKind::Runtimes => {
                    plan.runtimes = of.reclaimable;
                    true
                }
                SpaceKind::Kernels | SpaceKind::Snapshots => false,
            };
            if is_meant {
                plan.bytes += of.reclaimable_bytes;
            }
        }
        Ok(plan)
    }

    fn is_empty(&self) -> bool {
        let is_unnamed = self.layers == 0 && self.bytes == 0;
        is_unnamed && self.vms.is_empty() && self.images.is_empty() && self.runtimes.is_empty()
    }

    fn text(&self) -> String {
        let named = |what: &str, names: &[String]| -> String {
            names
                .iter()
                .map(|name| format!("  {what} {name}\n"))
                .collect()
        };
        let layers = match self.layers {
            0 => String::new(),
            n => format!("  {}\n", count(n, "cached layer")),
        };
        format!(
            "{}{}{}{layers}{} in all\n",
            named("VM", &self.vms),
            named("image", &self.images),
            named("guest runtime", &self.runtimes),
            size(self.bytes)
        )
    }
}

/// Returns the caller's VMs that do not run.
fn stopped_vms(client: &mut Client) -> Result<Vec<Vm>> {
    let uid = nix::unistd::geteuid().as_raw();
    let mut vms = client.list::<VmList>(VmListRequest {
        all: true,
        ..Default::default()
    })?;
    vms.retain(|vm| {
        let is_at_rest = matches!(
            vm.state,
            VmState::Created | VmState::Stopped | VmState::Failed
        );
        is_at_rest && vm.owner_uid == uid
    });
    Ok(vms)
}

fn prune(
    connector: &mut Connector,
    printer: &mut Printer,
    stdio: &Stdio,
    args: &PruneArgs,
) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    let plan = Plan::new(&mut client, args)?;
    if plan.is_empty() && !printer.json {
        printer.line("nothing to remove")?;
        return Ok(0);
    }
    if args.dry_run {
        match printer.json {
            true => printer.document(&plan)?,
            false => printer.text(&format!("would remove:\n{}", plan.text()))?,
        }
        return Ok(0);
    }
    if !args.force {
        let question = Question {
            doing: "prune",
            text: "remove all of this?".to_owned(),
            hint: "review the list (fcctl system prune --dry-run), then add --force",
        };
        if !printer.json {
            printer.text(&format!("to be removed:\n{}", plan.text()))?;
        }
        if !question.is_confirmed(printer, stdio)? {
            printer.note("nothing was removed");
            return Ok(1);
        }
    }
    let (removed, failed) = remove(&mut client, printer, &plan)?;
    match printer.json {
        true => printer.document(&removed)?,
        false => printer.text(&format!("removed:\n{}", removed.text()))?,
    }
    Ok(failed.map_or(0, |failure| failure.exit_status()))
}

/// Removes exactly what is in the plan. An object that is in use by now stays, and is an error.
/// Returns what was removed, and the first error.
fn remove(
    client: &mut Client,
    printer: &mut Printer,
    plan: &Plan,
) -> Result<(Plan, Option<Failure>)> {
    let mut removed = Plan::default();
    let mut failures = Vec::new();
    for (id, name) in plan.vm_ids.iter().zip(&plan.vms) {
        let request = VmDeleteRequest {
            vm: id.clone(),
            force: false,
            if_exists: true,
        };
        match operate::<VmDelete>(printer, client, &format!("delete {name}"), &request) {
            Ok(_) => removed.vms.push(name.clone()),
            Err(e) => failures.push(e),
        }
    }
    for name in &plan.images {
        match delete_image(client, name) {
            Ok(()) => removed.images.push(name.clone()),
            Err(e) => failures.push(e),
        }
    }
    let ImagePruneReply {
        layers, runtimes, ..
    } = client.call::<ImagePrune>(&ImagePruneRequest { all: false })?;
    (removed.layers, removed.runtimes) = (layers, runtimes);
    let left = client.call::<Space>(&Empty {})?.kinds;
    let left: u64 = left.iter().map(|of| of.bytes).sum();
    removed.bytes = plan.total_bytes.saturating_sub(left);
    for failure in &failures {
        printer.fail(failure, failure.exit_status());
    }
    Ok((removed, failures.into_iter().next()))
}

fn delete_image(client: &mut Client, name: &str) -> Result<()> {
    let image = name.parse().map_err(|e: Error| Failure::from(e))?;
    client.call::<ImageDelete>(&ImageRequest { image })?;
    Ok(())
}

#[cfg(test)]
#[path = "system_tests.rs"]
mod tests;
