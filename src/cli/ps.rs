//! `ps` and `vm list`.

use super::context::Context;
use super::output::{Table, age, short_digest, size};
use super::vm_text::{state, state_text, workspace_line};
use crate::api::vm::{Vm, VmBrief, VmList, VmListBrief, VmListRequest};
use crate::client::Result;

/// Maximum number of VMs in a page. A long list has several pages, so that the daemon builds a page
/// while fcctl formats the previous one.
const PAGE_ITEMS: u32 = 500;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Also list VMs that are not running
    #[arg(short, long)]
    all: bool,
    /// Print only IDs, one per line
    #[arg(short, long)]
    quiet: bool,
    /// Also show the digests of the images and the sizes of the disks
    #[arg(short, long, conflicts_with = "quiet")]
    size: bool,
    /// Like --size, with whole digests
    #[arg(long, conflicts_with = "quiet")]
    no_trunc: bool,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        now_s,
        ..
    } = ctx;
    let mut client = connector.connect(printer)?;
    let request = VmListRequest {
        all: args.all,
        ..Default::default()
    };
    if printer.json && !args.quiet {
        printer.document(&client.list::<VmList>(request)?)?;
        return Ok(0);
    }
    let request = VmListRequest {
        brief: true,
        limit: Some(PAGE_ITEMS),
        ..request
    };
    if args.quiet {
        let vms = client.list::<VmListBrief>(request)?;
        let ids: Vec<&str> = vms.iter().map(|vm| vm.id.as_str()).collect();
        if printer.json {
            printer.document(&ids)?;
        } else {
            printer.text(&ids.iter().map(|id| format!("{id}\n")).collect::<String>())?;
        }
        return Ok(0);
    }
    if args.size || args.no_trunc {
        let request = VmListRequest {
            brief: false,
            ..request
        };
        let mut table = Table::new(&[
            "NAME", "ID", "STATE", "IMAGE", "DIGEST", "SIZE", "VCPUS", "MEMORY", "CREATED",
        ]);
        client.list_pages::<VmList>(request, &mut |vms| {
            vms.iter()
                .for_each(|vm| row_with_size(&mut table, vm, *now_s, args.no_trunc))
        })?;
        printer.text(&table.render())?;
        return Ok(0);
    }
    let mut table = Table::new(&[
        "NAME",
        "ID",
        "STATE",
        "IMAGE",
        "VCPUS",
        "MEMORY",
        "CREATED",
        "WORKSPACE",
    ]);
    client.list_pages::<VmListBrief>(request, &mut |vms| {
        vms.iter().for_each(|vm| row(&mut table, vm, *now_s))
    })?;
    printer.text(&table.render())?;
    Ok(0)
}

fn row(table: &mut Table, vm: &VmBrief<'_>, now_s: u64) {
    table.cell(vm.name.as_str());
    table.cell(vm.id.as_str());
    table.cell(&state_text(
        vm.state,
        vm.reason.as_deref(),
        vm.paused,
        vm.unresponsive,
    ));
    table.cell(vm.image.as_str());
    table.cell(&vm.vcpus.to_string());
    table.cell(&size(vm.mem_mib << 20));
    table.cell(&age(now_s, vm.created_at));
    table.cell(
        &vm.workspace
            .as_ref()
            .map(workspace_line)
            .unwrap_or_default(),
    );
}

/// Leaves out the workspace, because the digest takes its place.
fn row_with_size(table: &mut Table, vm: &Vm, now_s: u64, is_whole: bool) {
    let digest = match vm.image_digest.as_deref() {
        None => "-",
        Some(digest) if is_whole => digest,
        Some(digest) => short_digest(digest),
    };
    table.cell(vm.name.as_str());
    table.cell(vm.id.as_str());
    table.cell(&state(vm));
    table.cell(vm.image.as_str());
    table.cell(digest);
    table.cell(&size(vm.disk_bytes));
    table.cell(&vm.vcpus.to_string());
    table.cell(&size(vm.mem_mib << 20));
    table.cell(&age(now_s, vm.created_at));
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
            NAME  ID            STATE    IMAGE    VCPUS  MEMORY  CREATED  WORKSPACE
            web   000000776562  running  default  1      1 GiB   1h ago
            db    000000006462  stopped  default  1      1 GiB   1h ago
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
    fn list_with_size_shows_digests_and_sizes() {
        let fake = Fake::start(|r| {
            let web = Vm {
                image_digest: Some(format!("sha256:{}", "0123456789abcdef".repeat(4))),
                ..vm("web", VmState::Running)
            };
            r.result(json!({"vms": [web, vm("db", VmState::Stopped)]}));
        });
        check(
            &fake,
            &["ps", "-as"],
            expect![[r#"
            > vm.list {"all":true,"limit":500}
            NAME  ID            STATE    IMAGE    DIGEST        SIZE   VCPUS  MEMORY  CREATED
            web   000000776562  running  default  0123456789ab  4 GiB  1      1 GiB   1h ago
            db    000000006462  stopped  default  -             4 GiB  1      1 GiB   1h ago
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
            db    000000006462  stopped  default  -                                                                        4 GiB  1      1 GiB   1h ago
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
            NAME         ID            STATE    IMAGE    VCPUS  MEMORY  CREATED  WORKSPACE
            web          000000776562  running  default  1      1 GiB   1h ago
            longer-name  6c6f6e676572  running  default  1      1 GiB   1h ago
            status 0
        "#]],
        );
    }
}
