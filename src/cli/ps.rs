//! `ps` and `vm list`.

use super::context::Context;
use super::format::{Field, ListArgs, Value, field};
use super::output::{Table, age, size};
use super::selection::Filter;
use super::vm_text::{label_list, state, state_text, workspace_line};
use crate::api::port::Port;
use crate::api::vm::{Vm, VmBrief, VmList, VmListBrief, VmListRequest};
use crate::client::{Client, Result};
use crate::ids::VmId;
use std::borrow::Cow;

/// Maximum number of VMs in a page. A long list has several pages, so that the daemon builds a page
/// while fcctl formats the previous one.
const PAGE_ITEMS: u32 = 500;
/// How many characters of a VM's labels a table shows without --no-trunc.
const LABELS_WIDTH_MAX: usize = 40;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Also list VMs that are not running
    #[arg(short, long)]
    all: bool,
    /// Print only IDs, one per line
    #[arg(short, long)]
    quiet: bool,
    /// Has no effect, because sizes are always shown
    #[arg(short, long, hide = true, conflicts_with_all = ["quiet", "format"])]
    size: bool,
    /// Show whole digests and labels
    #[arg(long, conflicts_with_all = ["quiet", "format"])]
    no_trunc: bool,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    list: ListArgs,
}

/// The fields of a VM, for templates and sorting.
pub(super) const FIELDS: &[Field<Vm>] = &[
    field("ID", "ID", |vm| Value::text(&vm.id)),
    field("Name", "NAME", |vm| Value::text(&vm.name)),
    field("State", "STATE", |vm| Value::text(vm.state.name())),
    field("Status", "STATUS", |vm| Value::text(state(vm))),
    field("Image", "IMAGE", |vm| Value::text(&vm.image)),
    field("Digest", "DIGEST", |vm| {
        Value::optional(vm.image_digest.as_ref())
    }),
    field("VCPUs", "VCPUS", |vm| Value::Number(vm.vcpus.into())),
    field("Memory", "MEMORY", |vm| Value::Bytes(vm.mem_mib << 20)),
    field("Size", "SIZE", |vm| Value::Bytes(vm.disk_bytes)),
    field("Created", "CREATED", |vm| Value::Time(vm.created_at)),
    field("Started", "STARTED", |vm| {
        vm.started_at.map_or(Value::Missing, Value::Time)
    }),
    field("IP", "IP", |vm| Value::optional(vm.ip)),
    field("IP6", "IP6", |vm| Value::optional(vm.ip6)),
    field("Ports", "PORTS", |vm| {
        Value::text(ports(&vm.ports, &vm.brief().refused_ports))
    }),
    field("SSH", "SSH", |vm| Value::optional(vm.ssh_addr)),
    field("Workspace", "WORKSPACE", |vm| {
        Value::optional(vm.workspace.as_ref().map(workspace_line))
    }),
    field("Labels", "LABELS", |vm| Value::text(label_list(&vm.labels))),
    field("Driver", "DRIVER", |vm| Value::optional(vm.driver.as_ref())),
    field("PID", "PID", |vm| {
        vm.pid
            .map_or(Value::Missing, |pid| Value::Number(pid.into()))
    }),
    field("Owner", "OWNER", |vm| Value::Number(vm.owner_uid.into())),
];

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        now_s,
        ..
    } = ctx;
    let template = args.list.parse(FIELDS)?;
    let mut client = connector.connect(printer)?;
    let request = VmListRequest {
        // A filter by state may choose VMs that are not running.
        all: args.all || args.filter.has_state(),
        limit: (!printer.json || args.quiet).then_some(PAGE_ITEMS),
        ..Default::default()
    };
    let needs_all_members = args.no_trunc || !args.list.is_empty();
    if args.quiet {
        let ids = ids(&mut client, request, &args)?;
        if printer.json {
            printer.document(&ids)?;
        } else {
            printer.text(&ids.iter().map(|id| format!("{id}\n")).collect::<String>())?;
        }
    } else if printer.json || needs_all_members {
        let vms = whole(&mut client, request, &args)?;
        match template {
            _ if printer.json => printer.document(&vms)?,
            Some(template) => printer.text(&template.render(FIELDS, &vms, *now_s))?,
            None => printer.text(&table(&vms, &args, *now_s))?,
        }
    } else {
        let mut table = usual_table();
        let request = VmListRequest {
            brief: true,
            ..request
        };
        client.list_pages::<VmListBrief>(request, &mut |vms| {
            let vms = vms.iter().filter(|vm| args.filter.matches(vm));
            vms.for_each(|vm| row(&mut table, vm, *now_s, false));
        })?;
        printer.text(&table.render())?;
    }
    Ok(0)
}

fn ids(client: &mut Client, request: VmListRequest, args: &Args) -> Result<Vec<VmId>> {
    if !args.list.is_empty() {
        let vms = whole(client, request, args)?;
        return Ok(vms.into_iter().map(|vm| vm.id).collect());
    }
    let request = VmListRequest {
        brief: true,
        ..request
    };
    let vms = client.list::<VmListBrief>(request)?;
    let chosen = vms.into_iter().filter(|vm| args.filter.matches(vm));
    Ok(chosen.map(|vm| vm.id.into_owned()).collect())
}

/// Returns the chosen VMs with all members, in the requested order.
fn whole(client: &mut Client, request: VmListRequest, args: &Args) -> Result<Vec<Vm>> {
    let mut vms = client.list::<VmList>(request)?;
    if !args.filter.is_empty() {
        vms.retain(|vm| args.filter.matches(&vm.brief()));
    }
    args.list.sort(&mut vms, FIELDS)?;
    Ok(vms)
}

fn table(vms: &[Vm], args: &Args, now_s: u64) -> String {
    let mut table = usual_table();
    for vm in vms {
        let mut brief = vm.brief();
        if args.no_trunc {
            brief.short_digest = vm.image_digest.as_deref().map(Cow::Borrowed);
        }
        row(&mut table, &brief, now_s, args.no_trunc);
    }
    table.render()
}

fn usual_table() -> Table {
    let headers = [
        "NAME",
        "ID",
        "STATE",
        "IMAGE",
        "DIGEST",
        "SIZE",
        "VCPUS",
        "MEMORY",
        "CREATED",
        "IP",
        "IP6",
        "PORTS",
        "WORKSPACE",
        "LABELS",
    ];
    Table::new(&headers).optional(&[4, 9, 10, 11, 12, 13])
}

fn row(table: &mut Table, vm: &VmBrief<'_>, now_s: u64, is_whole: bool) {
    table.cell(vm.name.as_str());
    table.cell(vm.id.as_str());
    table.cell(&state_text(
        vm.state,
        vm.reason.as_deref(),
        vm.paused,
        vm.unresponsive,
    ));
    table.cell(vm.image.as_str());
    table.cell(vm.short_digest.as_deref().unwrap_or_default());
    table.cell(&size(vm.disk_bytes));
    table.cell(&vm.vcpus.to_string());
    table.cell(&size(vm.mem_mib << 20));
    table.cell(&age(now_s, vm.created_at));
    table.cell(&vm.ip.map(|ip| ip.to_string()).unwrap_or_default());
    table.cell(&vm.ip6.map(|ip| ip.to_string()).unwrap_or_default());
    table.cell(&ports(&vm.ports, &vm.refused_ports));
    let workspace = vm.workspace.as_ref().map(workspace_line);
    table.cell(&workspace.unwrap_or_default());
    let labels = label_list(&vm.labels);
    table.cell(&if is_whole { labels } else { shortened(&labels) });
}

/// Lists ports as docker ps does: `127.0.0.1:8080->80/tcp`, and `3000/tcp` for a port on which the
/// guest listens and that is not forwarded.
fn ports(ports: &[Port], refused: &[u16]) -> String {
    let text = |port: &Port| {
        let (address, protocol) = (port.host_addr, port.protocol.name());
        let (host, guest) = (port.host_port, port.guest_port);
        format!("{address}:{host}->{guest}/{protocol}")
    };
    let refused = refused.iter().map(|port| format!("{port}/tcp"));
    let all: Vec<String> = ports.iter().map(text).chain(refused).collect();
    all.join(", ")
}

/// Shortens a text that would make the table too wide.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(LABELS_WIDTH_MAX) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, fcctl, two_vms, vm};
    use crate::api::vm::{Vm, VmState};
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

    #[test]
    fn list_prints_running_or_all() {
        let fake = two_vms();
        check(
            &fake,
            &["ps", "-a"],
            expect![[r#"
                > vm.list {"all":true,"brief":true,"limit":500}
                NAME  ID            STATE    IMAGE    SIZE   VCPUS  MEMORY  CREATED
                web   000000776562  running  default  4 GiB  1      1 GiB   1h ago
                db    000000006462  stopped  default  4 GiB  1      1 GiB   1h ago
                status 0
            "#]],
        );
        check(
            &fake,
            &["ps", "-aq"],
            expect![[r#"
            > vm.list {"all":true,"brief":true,"limit":500}
            000000776562
            000000006462
            status 0
        "#]],
        );
        check(
            &fake,
            &["vm", "list", "-q", "--json"],
            expect![[r#"
            > vm.list {"all":false,"brief":true,"limit":500}
            [
              "000000776562",
              "000000006462"
            ]
            status 0
        "#]],
        );
    }

    #[test]
    fn list_shows_digests_and_sizes() {
        let fake = Fake::start(|r| {
            let web = Vm {
                image_digest: Some(format!("sha256:{}", "0123456789abcdef".repeat(4))),
                ..vm("web", VmState::Running)
            };
            let db = vm("db", VmState::Stopped);
            let is_brief = r.params["brief"] == true;
            r.result(match is_brief {
                true => json!({"vms": [web.brief(), db.brief()]}),
                false => json!({"vms": [web, db]}),
            });
        });
        check(
            &fake,
            &["ps", "-a"],
            expect![[r#"
                > vm.list {"all":true,"brief":true,"limit":500}
                NAME  ID            STATE    IMAGE    DIGEST        SIZE   VCPUS  MEMORY  CREATED
                web   000000776562  running  default  0123456789ab  4 GiB  1      1 GiB   1h ago
                db    000000006462  stopped  default                4 GiB  1      1 GiB   1h ago
                status 0
            "#]],
        );
        check(
            &fake,
            &["ps", "--no-trunc"],
            expect![[r#"
                > vm.list {"all":false,"limit":500}
                NAME  ID            STATE    IMAGE    DIGEST                                                                   SIZE   VCPUS  MEMORY  CREATED
                web   000000776562  running  default  sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef  4 GiB  1      1 GiB   1h ago
                db    000000006462  stopped  default                                                                           4 GiB  1      1 GiB   1h ago
                status 0
            "#]],
        );
    }

    #[test]
    fn list_failed_vm_shows_harmless_reason() {
        let fake = Fake::start(|r| {
            let failed = Vm {
                reason: Some("the VMM died:\u{1b}[2J signal 9".to_owned()),
                ..vm("web", VmState::Failed)
            };
            r.result(json!({"vms": [failed]}));
        });
        let text = String::from_utf8(fcctl(&fake, &["ps", "-a"]).out).unwrap();
        assert!(
            text.contains(r"failed (the VMM died:\u{1b}[2J signal 9)"),
            "{text}"
        );
    }

    #[test]
    fn list_as_json_has_all_members() {
        let fake = two_vms();
        let ran = fcctl(&fake, &["ps", "--json"]);
        assert_eq!(fake.calls(), [r#"vm.list {"all":false}"#]);
        let vms: Vec<Vm> = serde_json::from_slice(&ran.out).unwrap();
        assert_eq!(
            vms,
            [vm("web", VmState::Running), vm("db", VmState::Stopped)]
        );
    }

    /// Starts a daemon with VMs that have ports, an address and labels.
    fn with_addresses() -> Fake {
        Fake::start(|r| {
            let port = |host_port, guest_port| crate::api::port::Port {
                host_addr: [127, 0, 0, 1].into(),
                host_port,
                guest_port,
                protocol: crate::api::port::Protocol::Tcp,
            };
            let web = Vm {
                ports: vec![port(8080, 80), port(8443, 443)],
                ip: Some([10, 89, 0, 2].into()),
                labels: serde_json::from_str(
                    r#"{"ci":"yes","note":"a long text that makes the line too wide"}"#,
                )
                .unwrap(),
                mem_mib: 512,
                ..vm("web", VmState::Running)
            };
            r.result(json!({"vms": [web, vm("db", VmState::Stopped)]}));
        })
    }

    #[test]
    fn list_shows_columns_that_have_text() {
        let fake = with_addresses();
        check(
            &fake,
            &["ps", "-a"],
            expect![[r#"
                > vm.list {"all":true,"brief":true,"limit":500}
                NAME  ID            STATE    IMAGE    SIZE   VCPUS  MEMORY   CREATED  IP         PORTS                                            LABELS
                web   000000776562  running  default  4 GiB  1      512 MiB  1h ago   10.89.0.2  127.0.0.1:8080->80/tcp, 127.0.0.1:8443->443/tcp  ci=yes, note=a long text that makes the ...
                db    000000006462  stopped  default  4 GiB  1      1 GiB    1h ago
                status 0
            "#]],
        );
        check(
            &fake,
            &["ps", "-a", "--no-trunc", "--filter", "label=ci"],
            expect![[r#"
                > vm.list {"all":true,"limit":500}
                NAME  ID            STATE    IMAGE    SIZE   VCPUS  MEMORY   CREATED  IP         PORTS                                            LABELS
                web   000000776562  running  default  4 GiB  1      512 MiB  1h ago   10.89.0.2  127.0.0.1:8080->80/tcp, 127.0.0.1:8443->443/tcp  ci=yes, note=a long text that makes the line too wide
                status 0
            "#]],
        );
        check(
            &fake,
            &["ps", "-q", "--filter", "state=stopped"],
            expect![[r#"
                > vm.list {"all":true,"brief":true,"limit":500}
                000000006462
                status 0
            "#]],
        );
    }

    #[test]
    fn list_with_template_and_order() {
        let fake = with_addresses();
        check(
            &fake,
            &[
                "ps",
                "--format",
                r"{{.Name}}\t{{.State}}\t{{.Ports}}",
                "--sort",
                "name",
            ],
            expect![[r#"
                > vm.list {"all":false,"limit":500}
                db	stopped	
                web	running	127.0.0.1:8080->80/tcp, 127.0.0.1:8443->443/tcp
                status 0
            "#]],
        );
        check(
            &fake,
            &[
                "ps",
                "-a",
                "--format",
                r"table {{.Name}}\t{{.Memory}}\t{{.IP}}",
                "--sort",
                "-memory",
            ],
            expect![[r#"
                > vm.list {"all":true,"limit":500}
                NAME  MEMORY   IP
                db    1 GiB
                web   512 MiB  10.89.0.2
                status 0
            "#]],
        );
        check(
            &fake,
            &["ps", "--sort", "memory", "--format", "table"],
            expect![[r#"
                > vm.list {"all":false,"limit":500}
                NAME  ID            STATE    IMAGE    SIZE   VCPUS  MEMORY   CREATED  IP         PORTS                                            LABELS
                web   000000776562  running  default  4 GiB  1      512 MiB  1h ago   10.89.0.2  127.0.0.1:8080->80/tcp, 127.0.0.1:8443->443/tcp  ci=yes, note=a long text that makes the ...
                db    000000006462  stopped  default  4 GiB  1      1 GiB    1h ago
                status 0
            "#]],
        );
        check(
            &fake,
            &["ps", "--format", "{{.Names}}"],
            expect![[r#"
                ! fcctl: --format has an unknown field: ".Names"
                ! hint: fields: .ID .Name .State .Status .Image .Digest .VCPUs .Memory .Size .Created .Started .IP .IP6 .Ports .SSH .Workspace .Labels .Driver .PID .Owner
                status 2
            "#]],
        );
        check(
            &fake,
            &["ps", "--sort", "size,name"],
            expect![[r#"
                ! fcctl: --sort "size,name": unknown field
                ! hint: fields: .ID .Name .State .Status .Image .Digest .VCPUs .Memory .Size .Created .Started .IP .IP6 .Ports .SSH .Workspace .Labels .Driver .PID .Owner
                status 2
            "#]],
        );
        for json in [
            &["ps", "--format", "json", "--filter", "name=db"][..],
            &["ps", "--format=json", "--filter", "name=db"],
            &["--format", "json", "vm", "list", "--filter", "name=db"],
            &["ps", "--json", "--filter", "name=db"],
        ] {
            let vms: Vec<Vm> = serde_json::from_slice(&fcctl(&fake, json).out).unwrap();
            assert_eq!(vms, [vm("db", VmState::Stopped)], "{json:?}");
        }
    }

    #[test]
    fn list_of_several_pages_is_one_table() {
        let fake = Fake::start(|r| match r.params["after"].as_str() {
            None => r.result(json!({"vms": [vm("web", VmState::Running)], "next": "1"})),
            Some("1") => {
                r.result(json!({"vms": [vm("longer-name", VmState::Running)], "next": "2"}))
            }
            _ => r.result(json!({"vms": []})),
        });
        check(
            &fake,
            &["ps"],
            expect![[r#"
                > vm.list {"all":false,"brief":true,"limit":500}
                > vm.list {"after":"1","all":false,"brief":true,"limit":500}
                > vm.list {"after":"2","all":false,"brief":true,"limit":500}
                NAME         ID            STATE    IMAGE    SIZE   VCPUS  MEMORY  CREATED
                web          000000776562  running  default  4 GiB  1      1 GiB   1h ago
                longer-name  6c6f6e676572  running  default  4 GiB  1      1 GiB   1h ago
                status 0
            "#]],
        );
    }
}
