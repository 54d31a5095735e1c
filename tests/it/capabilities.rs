//! Tests of the optional capabilities of a VM: published ports, a work disk and host files.

use crate::world::*;
use fcd::testing::api::daemon::Severity;
use fcd::testing::api::port::{Port, Protocol};
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::daemon::Caller;
use fcd::testing::error::{Error, Kind};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;

fn port(host_port: u16, guest_port: u16) -> Port {
    Port {
        host_addr: Ipv4Addr::LOCALHOST,
        host_port,
        guest_port,
        protocol: Protocol::Tcp,
    }
}

fn with_ports(name: &str, ports: &[Port]) -> VmCreateRequest {
    VmCreateRequest {
        name: Some(name.parse().unwrap()),
        ports: ports.to_vec(),
        ..Default::default()
    }
}

fn create(world: &World, name: &str, ports: &[Port]) -> Result<Vm, Failure> {
    world
        .call::<VmCreate>(&with_ports(name, ports))
        .map(|r| r.vm)
}

/// Listens on a port below the range from which the kernel picks ports for other sockets, so that
/// the port stays free after the listener is closed. Tests of other processes may run at the same
/// time. Returns the listener and the port.
fn listening() -> (TcpListener, u16) {
    let from = 20_100 + u16::try_from(std::process::id() % 10_000).unwrap();
    let mut listeners = (from..from + 100)
        .filter_map(|port| Some((TcpListener::bind(("127.0.0.1", port)).ok()?, port)));
    listeners.next().expect("no free port")
}

#[test]
fn guest_gets_its_host_name_and_name_servers() {
    let world = World::new();
    let create = |name: &str, dns: &[&str], net| {
        world.call::<VmCreate>(&VmCreateRequest {
            name: Some(name.parse().unwrap()),
            host_name: Some("Build-1.example.com".parse().unwrap()),
            dns: dns.iter().map(|server| server.parse().unwrap()).collect(),
            net,
            ..Default::default()
        })
    };
    let vm = create("web", &["1.1.1.1", "2001:db8::1"], None).unwrap().vm;
    world.place(&vm.id);
    world.start("web").unwrap();
    let seed = std::fs::read(world.vmm.last_spec(&vm.id).unwrap().seed).unwrap();
    let seed = String::from_utf8_lossy(&seed);
    for line in [
        "host_name=Build-1.example.com\n",
        "\ndns=1.1.1.1\ndns=2001:db8::1\n",
    ] {
        assert!(seed.contains(line), "{line}");
    }
    assert!(!seed.contains("dns=10."), "fcd's name server is replaced");
    let many = create("many", &["1.1.1.1"; 4], None).unwrap_err();
    assert_eq!(
        many.fault.message,
        "a guest queries at most 3 name servers, and these are 4"
    );
    let apart = create("apart", &["1.1.1.1"], Some(Net::None)).unwrap_err();
    assert!(apart.is(Kind::InvalidArgument), "{apart}");
}

#[test]
fn host_port_belongs_to_vm_until_deleted() {
    let world = World::new();
    let ports = [
        port(20080, 80),
        Port {
            protocol: Protocol::Udp,
            ..port(20080, 53)
        },
    ];
    assert_eq!(create(&world, "a", &ports).unwrap().ports, ports);
    for other in [
        port(20080, 1),
        Port {
            host_addr: Ipv4Addr::UNSPECIFIED,
            ..port(20080, 1)
        },
    ] {
        let e = create(&world, "b", &[port(20081, 1), other]).unwrap_err();
        assert!(
            e.is(Kind::PortTaken) && e.fault.message.contains(&other.to_string()),
            "{e:?}"
        );
    }
    assert!(world.show("b").unwrap_err().is(Kind::VmNotFound));
    create(
        &world,
        "b",
        &[
            port(20081, 1),
            Port {
                host_addr: Ipv4Addr::new(127, 0, 0, 2),
                ..port(20080, 1)
            },
        ],
    )
    .unwrap();
    world.delete("a").unwrap();
    create(&world, "c", &[port(20080, 1)]).unwrap();
}

#[test]
fn picked_port_is_kept() {
    let mut world = World::new();
    let picked = create(&world, "a", &[port(0, 80), port(20090, 81), port(0, 80)])
        .unwrap()
        .ports;
    assert_eq!(
        picked.iter().map(|p| p.guest_port).collect::<Vec<_>>(),
        [80, 81, 80],
        "the ports are in the order of the request"
    );
    assert!(
        picked.iter().all(|p| p.host_port != 0) && picked[0].host_port != picked[2].host_port,
        "{picked:?}"
    );
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(world.show("a").unwrap().ports, picked);
}

#[test]
fn invalid_ports_are_refused() {
    let world = World::new();
    let before = world.census();
    let user = Caller {
        uid: 1000,
        gid: 1000,
        pid: 1,
    };
    let root = Caller { uid: 0, ..user };
    let kind = |caller: &Caller, ports: &[Port], net: Option<Net>| {
        let e: Error = world
            .daemon()
            .creator
            .create(
                caller,
                &VmCreateRequest {
                    net,
                    ..with_ports("a", ports)
                },
            )
            .unwrap_err();
        assert!(e.hint_text().is_some(), "{e}");
        e.kind()
    };
    assert_eq!(kind(&root, &[port(20080, 0)], None), Kind::InvalidArgument);
    assert_eq!(
        kind(&root, &[port(20080, 80), port(20080, 81)], None),
        Kind::InvalidArgument
    );
    assert_eq!(
        kind(
            &root,
            &[Port {
                host_addr: Ipv4Addr::BROADCAST,
                ..port(20080, 80)
            }],
            None
        ),
        Kind::InvalidArgument
    );
    assert_eq!(
        kind(&root, &[port(20080, 80)], Some(Net::None)),
        Kind::InvalidArgument
    );
    assert_eq!(
        kind(
            &root,
            &(0..65).map(|i| port(20080 + i, 80)).collect::<Vec<_>>(),
            None
        ),
        Kind::InvalidArgument
    );
    let first: u16 = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    if first > 80 {
        assert_eq!(kind(&user, &[port(80, 80)], None), Kind::Denied);
        assert_eq!(
            kind(&root, &[port(80, 80)], None),
            Kind::Unsupported,
            "in user mode the VMM opens the port, and it does not run as root"
        );
    }
    assert_eq!(world.census(), before);
}

#[test]
fn ports_picked_concurrently_differ() {
    let world = World::new();
    let all: Vec<u16> = std::thread::scope(|scope| {
        let create = |n: usize| {
            create(&world, &format!("vm-{n}"), &[port(0, 80), port(0, 81)])
                .unwrap()
                .ports
        };
        let creations: Vec<_> = (0..8).map(|n| scope.spawn(move || create(n))).collect();
        creations
            .into_iter()
            .flat_map(|c| c.join().unwrap())
            .map(|p| p.host_port)
            .collect()
    });
    let mut unique = all.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), 16, "{all:?}");
}

#[test]
fn start_with_occupied_port_names_it() {
    let world = World::new();
    let (listener, number) = listening();
    let vm = create(&world, "a", &[port(number, 80)]).unwrap();
    world.place(&vm.id);
    let e = world.start("a").unwrap_err();
    assert!(
        e.is(Kind::PortTaken) && e.fault.message.contains(&number.to_string()),
        "{e:?}"
    );
    assert!(world.vmm.live().is_empty());
    drop(listener);
    world.start("a").unwrap();
}

fn work_file(world: &World, vm: &Vm) -> PathBuf {
    world
        .config
        .state_dir
        .join("vms")
        .join(vm.id.as_str())
        .join("work")
}

#[test]
fn work_disk_is_deleted_with_vm() {
    let world = World::new();
    let request = VmCreateRequest {
        work_disk_bytes: Some(32 << 20),
        ..with_ports("a", &[])
    };
    let vm = world.call::<VmCreate>(&request).unwrap().vm;
    assert_eq!(vm.work_disk_bytes, Some(32 << 20));
    world.place(&vm.id);
    world.start("a").unwrap();
    let path = work_file(&world, &vm);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 32 << 20);
    std::fs::write(&path, "kept").unwrap();
    world.stop("a").unwrap();
    world.place(&vm.id);
    world.start("a").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"kept");
    world
        .run::<VmDelete>(VmDeleteRequest {
            force: true,
            ..delete("a")
        })
        .unwrap();
    assert!(!path.exists());
    for bad in [0, 1 << 20, (32 << 20) + 1, u64::MAX] {
        let request = VmCreateRequest {
            work_disk_bytes: Some(bad),
            ..with_ports("a", &[])
        };
        assert!(
            world
                .call::<VmCreate>(&request)
                .unwrap_err()
                .is(Kind::InvalidArgument),
            "{bad}"
        );
    }
}

#[test]
fn image_with_old_init_refuses_capabilities() {
    let world = World::new();
    let path = world.config.state_dir.join("images/default/image.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"guest_version\":4,", "")).unwrap();
    let request = VmCreateRequest {
        work_disk_bytes: Some(32 << 20),
        ..with_ports("a", &[])
    };
    let vm = world.call::<VmCreate>(&request).unwrap().vm;
    world.place(&vm.id);
    let e = world.start("a").unwrap_err();
    assert!(
        e.is(Kind::Unsupported)
            && e.fault
                .hint
                .as_deref()
                .unwrap_or_default()
                .contains("image build"),
        "{e:?}"
    );
    assert!(!work_file(&world, &vm).exists());
    // A VM that requests no capability still starts.
    world.running("b");
}

#[test]
fn synced_files_are_read_at_each_start() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("ca.crt");
    let world = World::with(|config| {
        config.sync = vec![
            toml::from_str(&format!(
                "from = {from:?}\nto = '/etc/ca.crt'\nmode = '0640'"
            ))
            .unwrap(),
        ];
    });
    let vm = world.create("a");
    world.place(&vm.id);
    let e = world.start("a").unwrap_err();
    assert!(
        e.fault.message.contains(from.to_str().unwrap()) && e.fault.hint.is_some(),
        "{e:?}"
    );
    let check = |id: &str| {
        world
            .daemon()
            .doctor
            .doctor(&root())
            .unwrap()
            .checks
            .into_iter()
            .find(|c| c.id == id)
            .unwrap()
    };
    assert_eq!(check("sync").severity, Severity::Fail);
    for text in ["one", "another"] {
        std::fs::write(&from, text).unwrap();
        assert_eq!(check("sync").severity, Severity::Ok);
        world.place(&vm.id);
        world.start("a").unwrap();
        let seed = std::fs::read(
            world
                .config
                .state_dir
                .join("vms")
                .join(vm.id.as_str())
                .join("seed"),
        )
        .unwrap();
        let mut archive = tar::Archive::new(&seed[..]);
        let member = archive
            .entries()
            .unwrap()
            .map(Result::unwrap)
            .find(|e| e.path().unwrap().ends_with("files.tar"))
            .unwrap();
        let mut files = tar::Archive::new(member);
        let mut file = files.entries().unwrap().next().unwrap().unwrap();
        let mut read = String::new();
        std::io::Read::read_to_string(&mut file, &mut read).unwrap();
        assert_eq!(
            (
                file.path().unwrap().to_str().unwrap(),
                file.header().mode().unwrap(),
                read.as_str()
            ),
            ("etc/ca.crt", 0o640, text)
        );
        world.stop("a").unwrap();
    }
}

#[test]
fn doctor_checks_each_capability() {
    let world = World::new();
    let ids: Vec<String> = world
        .daemon()
        .doctor
        .doctor(&root())
        .unwrap()
        .checks
        .into_iter()
        .map(|c| c.id)
        .collect();
    for id in [
        "disk-space",
        "root-disk",
        "work-disk",
        "guest-network",
        "ports",
        "fake",
    ] {
        assert!(ids.iter().any(|i| i == id), "{id}: {ids:?}");
    }
}
