//! `port` and `vm ports`: lists the published ports of VMs, and changes those of one VM.

use super::connector::Connector;
use super::context::Context;
use super::printer::Printer;
use super::selection::{Selection, for_each_vm};
use super::values::{
    PortPattern, Publish, Removal, parse_port, parse_publish, parse_removal, published,
};
use super::vm_text::{port_line, refused_line};
use crate::api::Call;
use crate::api::port::Port;
use crate::api::vm::{VmPortAdd, VmPortRemove, VmPortsReply, VmPortsRequest, VmRequest, VmShow};
use crate::client::{Failure, Result};
use crate::error::{Error, Kind};
use crate::host::plural::count;
use crate::host::shell::quote;

// `port VM` lists, as with docker. A VM with the name of a verb needs `port list VM`.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    targets: Selection,
}

#[derive(clap::Subcommand, Debug)]
enum Verb {
    /// Publish ports of a VM, at once if it is running
    Add(AddArgs),
    /// Stop publishing ports of a VM
    #[command(alias = "remove")]
    Rm(RemoveArgs),
    /// List published ports of VMs
    #[command(alias = "ls")]
    List(Selection),
}

#[derive(clap::Args, Debug)]
struct AddArgs {
    /// Name, ID, or ID prefix
    vm: String,
    /// [[ADDR:]HOST:]GUEST[/udp]. ADDR defaults to 127.0.0.1, HOST to a free port. `auto` publishes
    /// whatever processes in the guest listen on, as long as they do
    #[arg(required = true, value_name = "PORT", value_parser = parse_publish)]
    ports: Vec<Publish>,
}

#[derive(clap::Args, Debug)]
struct RemoveArgs {
    /// Name, ID, or ID prefix
    vm: String,
    /// [[ADDR:]HOST:]GUEST[/udp]. A part that is left out matches anything. `auto` ends what port
    /// add VM auto began
    #[arg(required = true, value_name = "PORT", value_parser = parse_removal)]
    ports: Vec<Removal>,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let (connector, printer) = (&mut ctx.connector, &mut ctx.printer);
    match args.verb {
        None => list(connector, printer, &args.targets),
        Some(Verb::List(targets)) => list(connector, printer, &targets),
        Some(Verb::Add(args)) => {
            let ((ports, auto), vm) = (published(&args.ports), args.vm);
            let request = VmPortsRequest { vm, ports, auto };
            change::<VmPortAdd>(connector, printer, request, "")
        }
        Some(Verb::Rm(args)) => {
            let vm = connector
                .connect(printer)?
                .call::<VmShow>(&VmRequest { vm: args.vm })?
                .vm;
            let (mut ports, mut auto) = (Vec::new(), false);
            for removal in &args.ports {
                let Removal::Pattern(pattern) = removal else {
                    auto = true;
                    continue;
                };
                let port = the_match(vm.name.as_str(), &vm.ports, pattern)?;
                if !ports.contains(&port) {
                    ports.push(port);
                }
            }
            // Use the ID, because another VM may get the name meanwhile.
            let vm = vm.id.to_string();
            let request = VmPortsRequest { vm, ports, auto };
            change::<VmPortRemove>(connector, printer, request, "removed ")
        }
    }
}

fn list(connector: &mut Connector, printer: &mut Printer, targets: &Selection) -> Result<u8> {
    let several = targets.vms.len() != 1;
    for_each_vm(connector, printer, targets, |printer, client, vm| {
        let shown = client.call::<VmShow>(&VmRequest { vm: vm.vm.clone() });
        let vm = shown.map_err(|e| explained(e, &vm.vm, targets))?.vm;
        if !printer.json {
            let name = if several {
                format!("{}: ", vm.name)
            } else {
                String::new()
            };
            let auto = vm.auto_ports.as_ref().map(|_| format!("{name}auto\n"));
            printer.text(&(lines(&name, &vm.ports) + &auto.unwrap_or_default()))?;
            let refused = vm.auto_ports.iter().flat_map(|auto| &auto.refused);
            refused.for_each(|port| printer.note(&format!("{name}{}", refused_line(port))));
        }
        Ok(vm.ports)
    })
}

/// With docker, `port VM 80` shows where one port is published.
fn explained(e: Failure, word: &str, targets: &Selection) -> Failure {
    match targets.vms.as_slice() {
        [vm, port] if port == word && e.is(Kind::VmNotFound) && parse_port(port).is_ok() => {
            let (vm, port) = (quote(vm), quote(port));
            let text = format!("{port} is a port, and fcctl port lists the ports of VMs");
            let hint = format!("to publish it: fcctl port add {vm} {port}");
            Error::new(Kind::VmNotFound, text).hint(hint).into()
        }
        _ => e,
    }
}

fn lines(prefix: &str, ports: &[Port]) -> String {
    let line = |port| format!("{prefix}{}\n", port_line(port));
    ports.iter().map(line).collect()
}

/// Changes ports and prints them.
fn change<C: Call<Request = VmPortsRequest, Reply = VmPortsReply>>(
    connector: &mut Connector,
    printer: &mut Printer,
    request: VmPortsRequest,
    prefix: &str,
) -> Result<u8> {
    let ports = connector.connect(printer)?.call::<C>(&request)?.ports;
    if printer.json {
        printer.document(&ports)?;
    } else {
        let auto = if request.auto {
            format!("{prefix}auto\n")
        } else {
            String::new()
        };
        printer.text(&(lines(prefix, &ports) + &auto))?;
    }
    Ok(0)
}

/// Returns the only port that a pattern matches.
fn the_match(vm: &str, ports: &[Port], pattern: &PortPattern) -> Result<Port> {
    let found: Vec<&Port> = ports.iter().filter(|port| pattern.matches(port)).collect();
    match found.as_slice() {
        [port] => Ok(**port),
        [] => Err(
            Error::invalid(format!("VM {vm} does not publish {pattern}"))
                .hint(format!("list its ports: fcctl port {vm}"))
                .into(),
        ),
        [first, ..] => Err(Error::invalid(format!(
            "VM {vm} publishes {pattern} {}",
            count(found.len() as u64, "time")
        ))
        .hint(format!(
            "name one, such as {}:{}:{}",
            first.host_addr, first.host_port, first.guest_port
        ))
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, vm};
    use crate::api::port::{AutoPorts, Port, Protocol, RefusalCause, RefusedPort, loopback};
    use crate::api::vm::VmState;
    use crate::client::fake::Fake;
    use crate::error::{Error, Kind};
    use expect_test::expect;
    use serde_json::json;

    fn port(host_port: u16, guest_port: u16) -> Port {
        Port {
            host_addr: loopback(),
            host_port,
            guest_port,
            protocol: Protocol::Tcp,
        }
    }

    /// Starts a daemon that publishes every requested port, and picks 40001 as the free one.
    fn publishing() -> Fake {
        let mut web = vm("web", VmState::Running);
        web.ports = vec![port(8080, 80), port(8081, 80), port(5432, 5432)];
        Fake::start(move |r| {
            if r.method == "vm.show" {
                return r.result(json!({ "vm": web }));
            }
            let mut ports: Vec<Port> = serde_json::from_value(r.params["ports"].clone()).unwrap();
            let open = ports.iter_mut().filter(|port| port.host_port == 0);
            open.for_each(|port| port.host_port = 40001);
            r.result(json!({"vm": web, "ports": ports}))
        })
    }

    #[test]
    fn ports_are_listed_like_docker() {
        for args in [
            &["port", "web"][..],
            &["port", "list", "web"],
            &["port", "ls", "web"],
            &["vm", "ports", "web"],
            &["vm", "ports", "list", "web"],
        ] {
            check(
                &publishing(),
                args,
                expect![[r#"
                    > vm.show {"vm":"web"}
                    80/tcp -> 127.0.0.1:8080
                    80/tcp -> 127.0.0.1:8081
                    5432/tcp -> 127.0.0.1:5432
                    status 0
                "#]],
            );
        }
    }

    #[test]
    fn added_ports_are_printed_with_picked_numbers() {
        check(
            &publishing(),
            &["port", "add", "web", "3000:3000", "53/udp"],
            expect![[r#"
                > vm.port_add {"ports":[{"guest_port":3000,"host_addr":"127.0.0.1","host_port":3000,"protocol":"tcp"},{"guest_port":53,"host_addr":"127.0.0.1","host_port":0,"protocol":"udp"}],"vm":"web"}
                3000/tcp -> 127.0.0.1:3000
                53/udp -> 127.0.0.1:40001
                status 0
            "#]],
        );
        check(
            &publishing(),
            &["--json", "vm", "ports", "add", "web", "80"],
            expect![[r#"
                > vm.port_add {"ports":[{"guest_port":80,"host_addr":"127.0.0.1","host_port":0,"protocol":"tcp"}],"vm":"web"}
                [
                  {
                    "host_addr": "127.0.0.1",
                    "host_port": 40001,
                    "guest_port": 80,
                    "protocol": "tcp"
                  }
                ]
                status 0
            "#]],
        );
    }

    #[test]
    fn auto_goes_with_ports_and_alone() {
        check(
            &publishing(),
            &["port", "add", "web", "3000:3000", "auto"],
            expect![[r#"
                > vm.port_add {"auto":true,"ports":[{"guest_port":3000,"host_addr":"127.0.0.1","host_port":3000,"protocol":"tcp"}],"vm":"web"}
                3000/tcp -> 127.0.0.1:3000
                auto
                status 0
            "#]],
        );
        check(
            &publishing(),
            &["port", "rm", "web", "auto"],
            expect![[r#"
                > vm.show {"vm":"web"}
                > vm.port_remove {"auto":true,"ports":[],"vm":"000000776562"}
                removed auto
                status 0
            "#]],
        );
    }

    #[test]
    fn list_says_which_ports_are_not_forwarded() {
        let mut web = vm("web", VmState::Running);
        web.ports = vec![port(3000, 3000)];
        web.auto_ports = Some(AutoPorts {
            open: web.ports.clone(),
            refused: vec![RefusedPort {
                guest_port: 8080,
                cause: RefusalCause::Conflict,
                reason: "port 127.0.0.1:8080/tcp belongs to another VM".into(),
            }],
        });
        check(
            &Fake::start(move |r| r.result(json!({ "vm": web }))),
            &["port", "web"],
            expect![[r#"
                > vm.show {"vm":"web"}
                3000/tcp -> 127.0.0.1:3000
                auto
                ! fcctl: port 8080 is not forwarded: port 127.0.0.1:8080/tcp belongs to another VM
                status 0
            "#]],
        );
    }

    #[test]
    fn removed_port_is_found_by_what_is_given_of_it() {
        check(
            &publishing(),
            &["port", "rm", "web", "8081:80", "5432"],
            expect![[r#"
                > vm.show {"vm":"web"}
                > vm.port_remove {"ports":[{"guest_port":80,"host_addr":"127.0.0.1","host_port":8081,"protocol":"tcp"},{"guest_port":5432,"host_addr":"127.0.0.1","host_port":5432,"protocol":"tcp"}],"vm":"000000776562"}
                removed 80/tcp -> 127.0.0.1:8081
                removed 5432/tcp -> 127.0.0.1:5432
                status 0
            "#]],
        );
        check(
            &publishing(),
            &["port", "rm", "web", "80"],
            expect![[r#"
                > vm.show {"vm":"web"}
                ! fcctl: VM web publishes 80/tcp 2 times
                ! hint: name one, such as 127.0.0.1:8080:80
                status 2
            "#]],
        );
        for (text, shown) in [("81", "81/tcp"), ("0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp")] {
            let ran = super::super::tests::fcctl(&publishing(), &["port", "rm", "web", text]);
            assert_eq!(ran.status, 2);
            let text = format!(
                "fcctl: VM web does not publish {shown}\nhint: list its ports: fcctl port web\n"
            );
            assert_eq!(ran.err, text);
        }
    }

    #[test]
    fn port_without_words_or_with_bad_ones_is_usage_error() {
        for (args, expected) in [
            (
                &["port"][..],
                expect![[r#"
                ! fcctl: the following required arguments were not provided:
                !   <VM>...
                ! 
                ! Usage: fcctl vm ports <VM>...
                ! 
                ! For more information, try '--help'.
                status 2
            "#]],
            ),
            (
                &["port", "add", "web"],
                expect![[r#"
                ! fcctl: the following required arguments were not provided:
                !   <PORT>...
                ! 
                ! Usage: fcctl vm ports add <VM> <PORT>...
                ! 
                ! For more information, try '--help'.
                status 2
            "#]],
            ),
            (
                &["port", "add", "web", "http"],
                expect![[r#"
                ! fcctl: invalid value 'http' for '<PORT>...': use [[ADDR:]HOST:]GUEST[/udp], such as 8080:80, 0.0.0.0:8080:80 or 80, or auto
                ! 
                ! For more information, try '--help'.
                status 2
            "#]],
            ),
        ] {
            check(&publishing(), args, expected);
        }
    }

    #[test]
    fn conflict_shows_cause() {
        let refuses = Fake::start(|r| {
            r.fault(
                Error::new(
                    Kind::PortTaken,
                    "port 127.0.0.1:80/tcp belongs to another VM",
                )
                .hint("use another one"),
            )
        });
        check(
            &refuses,
            &["port", "add", "web", "80:80"],
            expect![[r#"
                > vm.port_add {"ports":[{"guest_port":80,"host_addr":"127.0.0.1","host_port":80,"protocol":"tcp"}],"vm":"web"}
                ! fcctl: port 127.0.0.1:80/tcp belongs to another VM
                ! hint: use another one
                status 4
            "#]],
        );
    }
}
