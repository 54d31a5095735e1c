//! `snapshot`: saves running VMs and restores them.

use super::connector::{Connector, operate};
use super::context::Context;
use super::format::{QuietListArgs, Shape, Value, field};
use super::output::{self, age, size};
use super::printer::Printer;
use crate::api::snapshot::{
    Snapshot, SnapshotCreate, SnapshotCreateRequest, SnapshotDelete, SnapshotList,
    SnapshotListRequest, SnapshotRequest, SnapshotRestore, SnapshotRestoreRequest, SnapshotShow,
};
use crate::api::vm::Net;
use crate::client::Result;
use crate::host::text::printable;
use crate::ids::{SnapshotName, VmName};

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Save a running VM, memory and disks. The guest is paused while it is saved
    Create {
        /// Name, ID, or ID prefix
        vm: String,
        /// Name of the snapshot [default: the VM's name and a number]
        #[arg(short, long)]
        name: Option<SnapshotName>,
    },
    /// List snapshots
    #[command(visible_alias = "ls")]
    List {
        /// List only snapshots of this VM
        #[arg(long)]
        vm: Option<String>,
        #[command(flatten)]
        list: QuietListArgs,
    },
    /// Show details of snapshots
    Show(Targets),
    /// Delete snapshots. VMs started from them keep running
    #[command(visible_alias = "rm")]
    Delete(Targets),
    /// Continue a stopped VM from a snapshot. Changes on its disks since then are lost
    Restore {
        /// Name, ID, or ID prefix
        snapshot: String,
        /// Continue in a new VM with this name, and leave the old one alone
        #[arg(long = "as", value_name = "NAME")]
        new_vm: Option<VmName>,
    },
}

#[derive(clap::Args, Debug)]
pub(super) struct Targets {
    /// Names, IDs, or ID prefixes
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        now_s,
        ..
    } = ctx;
    match verb {
        Verb::Create { vm, name } => create(connector, printer, SnapshotCreateRequest { vm, name }),
        Verb::List { vm, list: args } => {
            args.check(&SHAPE)?;
            let request = SnapshotListRequest {
                vm,
                ..Default::default()
            };
            let mut client = connector.connect(printer)?;
            let snapshots = client.list::<SnapshotList>(request)?;
            args.print(printer, &SHAPE, snapshots, *now_s)?;
            Ok(0)
        }
        Verb::Show(args) => show(connector, printer, *now_s, &args),
        Verb::Delete(args) => delete(connector, printer, &args),
        Verb::Restore { snapshot, new_vm } => restore(
            connector,
            printer,
            SnapshotRestoreRequest { snapshot, new_vm },
        ),
    }
}

fn create(
    connector: &mut Connector,
    printer: &mut Printer,
    request: SnapshotCreateRequest,
) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    let doing = format!("save {}", printable(&request.vm));
    let snapshot = operate::<SnapshotCreate>(printer, &mut client, &doing, &request)?.snapshot;
    if printer.json {
        printer.document(&snapshot)?;
    } else {
        printer.line(snapshot.name.as_str())?;
    }
    Ok(0)
}

pub(super) const SHAPE: Shape<Snapshot> = Shape {
    fields: &[
        field("Name", "NAME", |s| Value::text(&s.name)),
        field("ID", "ID", |s| Value::text(&s.id)),
        field("VM", "VM", |s| Value::text(&s.vm_name)),
        field("Image", "IMAGE", |s| Value::text(&s.image)),
        field("VCPUs", "VCPUS", |s| Value::Number(s.vcpus.into())),
        field("Memory", "MEMORY", |s| Value::Bytes(s.mem_mib << 20)),
        field("Size", "ON HOST", |s| Value::Bytes(s.bytes)),
        field("Created", "CREATED", |s| Value::Time(s.created_at)),
        field("Driver", "DRIVER", |s| Value::text(&s.driver)),
        field("Owner", "OWNER", |s| Value::Number(s.owner_uid.into())),
    ],
    id: |snapshot| snapshot.name.to_string(),
    table,
};

fn table(snapshots: &[Snapshot], now_s: u64) -> String {
    let row = |s: &Snapshot| {
        let (memory, taken) = (size(s.mem_mib << 20), size(s.bytes));
        vec![
            s.name.to_string(),
            s.id.to_string(),
            s.vm_name.to_string(),
            memory,
            taken,
            age(now_s, s.created_at),
        ]
    };
    let rows: Vec<_> = snapshots.iter().map(row).collect();
    let headers = ["NAME", "ID", "VM", "MEMORY", "ON HOST", "CREATED"];
    output::table(&headers, &rows)
}

fn show(
    connector: &mut Connector,
    printer: &mut Printer,
    now_s: u64,
    args: &Targets,
) -> Result<u8> {
    let mut is_first = true;
    connector.for_each(printer, &args.snapshots, |printer, client, snapshot| {
        let snapshot = client
            .call::<SnapshotShow>(&SnapshotRequest {
                snapshot: snapshot.to_owned(),
            })?
            .snapshot;
        if !printer.json {
            let gap = if std::mem::replace(&mut is_first, false) {
                ""
            } else {
                "\n"
            };
            printer.text(&format!("{gap}{}", sheet(&snapshot, now_s)))?;
        }
        Ok(snapshot)
    })
}

/// Formats all details of a snapshot, one per line.
fn sheet(snapshot: &Snapshot, now_s: u64) -> String {
    let mut facts = vec![
        ("name", snapshot.name.to_string()),
        ("id", snapshot.id.to_string()),
        ("vm", format!("{} ({})", snapshot.vm_name, snapshot.vm)),
        ("owner", format!("uid {}", snapshot.owner_uid)),
        ("created", age(now_s, snapshot.created_at)),
        ("image", snapshot.image.to_string()),
        (
            "driver",
            snapshot
                .vmm_version
                .iter()
                .fold(snapshot.driver.clone(), |driver, version| {
                    format!("{driver}, version {version}")
                }),
        ),
        ("vcpus", snapshot.vcpus.to_string()),
        ("memory", size(snapshot.mem_mib << 20)),
        ("disk", size(snapshot.disk_bytes)),
    ];
    facts.extend(
        snapshot
            .work_disk_bytes
            .map(|bytes| ("work disk", size(bytes))),
    );
    facts.extend((snapshot.net == Net::None).then(|| ("network", "none".to_owned())));
    facts.push(("on host", size(snapshot.bytes)));
    facts
        .iter()
        .map(|(name, value)| format!("{name:<11} {}\n", printable(value)))
        .collect()
}

fn delete(connector: &mut Connector, printer: &mut Printer, args: &Targets) -> Result<u8> {
    connector.for_each(printer, &args.snapshots, |printer, client, snapshot| {
        let reply = client.call::<SnapshotDelete>(&SnapshotRequest {
            snapshot: snapshot.to_owned(),
        })?;
        if !printer.json {
            printer.line(&format!("{}: deleted", printable(snapshot)))?;
        }
        Ok(reply)
    })
}

fn restore(
    connector: &mut Connector,
    printer: &mut Printer,
    request: SnapshotRestoreRequest,
) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    let doing = format!("restore {}", printable(&request.snapshot));
    let vm = operate::<SnapshotRestore>(printer, &mut client, &doing, &request)?.vm;
    if printer.json {
        printer.document(&vm)?;
    } else {
        printer.line(&format!("{}: {}", vm.name, vm.state.name()))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOW_S, check, vm};
    use super::*;
    use crate::api::vm::VmState;
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

    fn one() -> Snapshot {
        Snapshot {
            id: "0123456789ab".parse().unwrap(),
            name: "one".parse().unwrap(),
            owner_uid: 1000,
            vm: "000000776562".parse().unwrap(),
            vm_name: "web".parse().unwrap(),
            created_at: NOW_S - 3700,
            image: "default".parse().unwrap(),
            vcpus: 1,
            mem_mib: 1024,
            disk_bytes: 8 << 30,
            work_disk_bytes: Some(64 << 20),
            net: Net::None,
            driver: "qemu (tcg, microvm)\u{1b}[2J".to_owned(),
            vmm_version: Some("7.2.22".to_owned()),
            bytes: 150 << 20,
        }
    }

    fn daemon() -> Fake {
        Fake::start(|r| {
            let reply = match r.method.as_str() {
                "snapshot.create" | "snapshot.show" => json!({ "snapshot": one() }),
                "snapshot.list" => json!({ "snapshots": [one()] }),
                "snapshot.delete" => json!({ "deleted": one().id }),
                _ => json!({ "vm": vm("twin", VmState::Running) }),
            };
            r.result(reply);
        })
    }

    #[test]
    fn snapshot_verbs_call_the_daemon() {
        let fake = daemon();
        check(
            &fake,
            &["snapshot", "create", "web", "-n", "one"],
            expect![[r#"
            > snapshot.create {"name":"one","vm":"web"}
            one
            status 0
        "#]],
        );
        check(
            &fake,
            &["snapshot", "ls", "--vm", "web"],
            expect![[r#"
            > snapshot.list {"vm":"web"}
            NAME  ID            VM   MEMORY  ON HOST  CREATED
            one   0123456789ab  web  1 GiB   150 MiB  1h ago
            status 0
        "#]],
        );
        check(
            &fake,
            &[
                "snapshot",
                "ls",
                "--format",
                "table {{.Name}}\\t{{.Size}} of {{.VM}}",
            ],
            expect![[r#"
                > snapshot.list {}
                NAME  ON HOST of VM
                one   150 MiB of web
                status 0
            "#]],
        );
        check(
            &fake,
            &["snapshot", "ls", "-q"],
            expect![[r#"
            > snapshot.list {}
            one
            status 0
        "#]],
        );
        check(
            &fake,
            &["snapshot", "show", "one"],
            expect![[r#"
            > snapshot.show {"snapshot":"one"}
            name        one
            id          0123456789ab
            vm          web (000000776562)
            owner       uid 1000
            created     1h ago
            image       default
            driver      qemu (tcg, microvm)\u{1b}[2J, version 7.2.22
            vcpus       1
            memory      1 GiB
            disk        8 GiB
            work disk   64 MiB
            network     none
            on host     150 MiB
            status 0
        "#]],
        );
        check(
            &fake,
            &["snapshot", "restore", "one", "--as", "twin"],
            expect![[r#"
            > snapshot.restore {"new_vm":"twin","snapshot":"one"}
            twin: running
            status 0
        "#]],
        );
        check(
            &fake,
            &["vm", "fork", "web", "twin"],
            expect![[r#"
            > vm.fork {"name":"twin","vm":"web"}
            twin
            status 0
        "#]],
        );
        check(
            &fake,
            &["snapshot", "rm", "one"],
            expect![[r#"
            > snapshot.delete {"snapshot":"one"}
            one: deleted
            status 0
        "#]],
        );
    }
}
