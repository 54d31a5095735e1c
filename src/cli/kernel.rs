//! `kernel`: kernels that VMs can boot instead of their image's.

use super::connector::{Connector, operate};
use super::context::Context;
use super::format::{QuietListArgs, Shape, Value, field};
use super::output::{self, age, size};
use super::printer::Printer;
use crate::api::kernel::{
    Kernel, KernelDelete, KernelImport, KernelImportRequest, KernelList, KernelRequest, KernelShow,
};
use crate::api::page::ListRequest;
use crate::client::Result;
use crate::error::Error;
use crate::host::text::printable;
use crate::ids::KernelName;
use std::path::PathBuf;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Import a kernel from this host: a vmlinux, or a distribution's vmlinuz with its modules
    Import {
        /// Path of a vmlinux or vmlinuz
        path: PathBuf,
        /// Name of the kernel [default: its version]
        #[arg(short, long)]
        name: Option<KernelName>,
        /// Directory with its modules.dep [default: /lib/modules/VERSION]
        #[arg(long, value_name = "DIR")]
        modules: Option<PathBuf>,
    },
    /// List kernels
    #[command(visible_alias = "ls")]
    List(QuietListArgs),
    /// Show details of a kernel
    Show { kernel: KernelName },
    /// Delete a kernel that no VM needs
    #[command(visible_alias = "rm")]
    Delete { kernel: KernelName },
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        now_s,
        ..
    } = ctx;
    match verb {
        Verb::Import {
            path,
            name,
            modules,
        } => import(connector, printer, path, name, modules),
        Verb::List(args) => list(connector, printer, *now_s, &args),
        Verb::Show { kernel } => show(connector, printer, *now_s, KernelRequest { kernel }),
        Verb::Delete { kernel } => delete(connector, printer, KernelRequest { kernel }),
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).map_err(|e| Error::io(format!("find {}", path.display()), e).into())
}

fn import(
    connector: &mut Connector,
    printer: &mut Printer,
    path: PathBuf,
    name: Option<KernelName>,
    modules: Option<PathBuf>,
) -> Result<u8> {
    let request = KernelImportRequest {
        path: absolute(path)?,
        name,
        modules: modules.map(absolute).transpose()?,
    };
    let mut client = connector.connect(printer)?;
    let kernel = operate::<KernelImport>(printer, &mut client, "import kernel", &request)?.kernel;
    if printer.json {
        printer.document(&kernel)?;
    } else {
        printer.line(kernel.name.as_str())?;
    }
    Ok(0)
}

pub(super) const SHAPE: Shape<Kernel> = Shape {
    fields: &[
        field("Name", "NAME", |k| Value::text(&k.name)),
        field("Version", "VERSION", |k| Value::text(&k.version)),
        field("Size", "ON HOST", |k| Value::Bytes(k.bytes)),
        field("Imported", "IMPORTED", |k| Value::Time(k.imported_at)),
        field("VMs", "VMS", |k| Value::Number(k.vms)),
    ],
    id: |kernel| kernel.name.to_string(),
    table,
};

fn list(
    connector: &mut Connector,
    printer: &mut Printer,
    now_s: u64,
    args: &QuietListArgs,
) -> Result<u8> {
    args.check(&SHAPE)?;
    let mut client = connector.connect(printer)?;
    let kernels = client.list::<KernelList>(ListRequest::default())?;
    args.print(printer, &SHAPE, kernels, now_s)?;
    Ok(0)
}

fn table(kernels: &[Kernel], now_s: u64) -> String {
    let row = |k: &Kernel| {
        vec![
            k.name.to_string(),
            printable(&k.version),
            size(k.bytes),
            age(now_s, k.imported_at),
            k.vms.to_string(),
        ]
    };
    let rows: Vec<_> = kernels.iter().map(row).collect();
    output::table(&["NAME", "VERSION", "ON HOST", "IMPORTED", "VMS"], &rows)
}

fn show(
    connector: &mut Connector,
    printer: &mut Printer,
    now_s: u64,
    request: KernelRequest,
) -> Result<u8> {
    let kernel = connector
        .connect(printer)?
        .call::<KernelShow>(&request)?
        .kernel;
    if printer.json {
        printer.document(&kernel)?;
        return Ok(0);
    }
    let modules = if kernel.modules.is_empty() {
        "none: built in".to_owned()
    } else {
        kernel.modules.join(", ")
    };
    let facts = [
        ("name", kernel.name.to_string()),
        ("version", kernel.version),
        ("modules", modules),
        ("imported", age(now_s, kernel.imported_at)),
        ("on host", size(kernel.bytes)),
        ("vms", kernel.vms.to_string()),
    ];
    printer.text(
        &facts
            .iter()
            .map(|(name, value)| format!("{name:<11} {}\n", printable(value)))
            .collect::<String>(),
    )?;
    Ok(0)
}

fn delete(connector: &mut Connector, printer: &mut Printer, request: KernelRequest) -> Result<u8> {
    let reply = connector.connect(printer)?.call::<KernelDelete>(&request)?;
    if printer.json {
        printer.document(&reply)?;
    } else {
        printer.line(&format!("{}: deleted", reply.deleted))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOW_S, check};
    use super::*;
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

    #[test]
    fn kernel_verbs_call_the_daemon() {
        let fake = Fake::start(|r| {
            let kernel = |name: &str, modules: &[&str]| Kernel {
                name: name.parse().unwrap(),
                version: "6.1\u{1b}[2J".to_owned(),
                modules: modules.iter().map(|m| (*m).to_owned()).collect(),
                imported_at: NOW_S - 61,
                bytes: 32 << 20,
                vms: 2,
            };
            let reply = match r.method.as_str() {
                "kernel.list" => json!({ "kernels": [kernel("linux", &[])] }),
                "kernel.delete" => json!({ "deleted": "linux" }),
                "kernel.show" => {
                    json!({ "kernel": kernel("linux", &["virtio.ko", "virtio_blk.ko"]) })
                }
                _ => json!({ "kernel": kernel("linux", &[]) }),
            };
            r.result(reply);
        });
        check(
            &fake,
            &[
                "kernel",
                "import",
                "/boot/vmlinuz",
                "--modules",
                "/m",
                "-n",
                "linux",
            ],
            expect![[r#"
            > kernel.import {"modules":"/m","name":"linux","path":"/boot/vmlinuz"}
            linux
            status 0
        "#]],
        );
        check(
            &fake,
            &["kernel", "ls"],
            expect![[r#"
            > kernel.list {}
            NAME   VERSION       ON HOST  IMPORTED  VMS
            linux  6.1\u{1b}[2J  32 MiB   1m ago    2
            status 0
        "#]],
        );
        check(
            &fake,
            &[
                "kernel",
                "ls",
                "--format",
                r"{{.Name}}\t{{.VMs}}",
                "--sort",
                "-imported",
            ],
            expect![[r#"
                > kernel.list {}
                linux	2
                status 0
            "#]],
        );
        check(
            &fake,
            &["kernel", "ls", "-q"],
            expect![[r#"
            > kernel.list {}
            linux
            status 0
        "#]],
        );
        check(
            &fake,
            &["kernel", "show", "linux"],
            expect![[r#"
            > kernel.show {"kernel":"linux"}
            name        linux
            version     6.1\u{1b}[2J
            modules     virtio.ko, virtio_blk.ko
            imported    1m ago
            on host     32 MiB
            vms         2
            status 0
        "#]],
        );
        check(
            &fake,
            &["kernel", "rm", "linux"],
            expect![[r#"
            > kernel.delete {"kernel":"linux"}
            linux: deleted
            status 0
        "#]],
        );
    }
}
