//! Tests of what a VM's commands get by default: a user, a directory and variables.

use crate::guest_runtime::{make_image_of, make_runtime};
use crate::world::*;
use fcd::testing::api::exec::{ExecStart, ExecStartRequest};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const SECRET: &str = "s3cret-value";

fn with_defaults(name: &str, image: Option<&str>) -> VmCreateRequest {
    VmCreateRequest {
        name: Some(name.parse().unwrap()),
        image: image.map(|image| image.parse().unwrap()),
        user: Some("dev:staff".into()),
        workdir: Some("/srv/app".into()),
        env: vec![
            ("TOKEN".into(), SECRET.into()),
            ("MODE".into(), "vm".into()),
        ],
        ..Default::default()
    }
}

fn start(world: &World, request: &VmCreateRequest) -> Vm {
    let vm = world.call::<VmCreate>(request).unwrap().vm;
    world.place(&vm.id);
    world.start(vm.name.as_str()).unwrap()
}

/// Runs a command and returns the line that the guest got.
fn exec(world: &World, vm: &str, change: impl FnOnce(&mut ExecStartRequest)) -> String {
    let mut request = ExecStartRequest {
        vm: vm.into(),
        argv: vec!["make".into()],
        env: vec![],
        workdir: None,
        user: None,
        pty: None,
        streams: vec![],
        no_wait_children: false,
    };
    change(&mut request);
    world.run::<ExecStart>(request).unwrap();
    world.guest.calls().last().unwrap().command.clone()
}

/// Returns the files below `dir` that contain the value of the secret.
fn holders(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(holders(&path));
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            if bytes.windows(SECRET.len()).any(|w| w == SECRET.as_bytes()) {
                found.push(path.file_name().unwrap().to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn commands_get_the_vms_user_directory_and_variables() {
    let mut world = World::new();
    let vm = start(&world, &with_defaults("web", None));
    assert_eq!(vm.commands.env, ["TOKEN", "MODE"]);
    let line = exec(&world, "web", |_| {});
    for part in [
        "set -- dev staff;",
        "cd /srv/app ",
        " env -- TOKEN=s3cret-value MODE=vm make",
    ] {
        assert!(line.contains(part), "{part}\n{line}");
    }
    let line = exec(&world, "web", |request| {
        request.env = vec![("MODE".into(), "mine".into())];
        request.user = Some("0".into());
        request.workdir = Some("/tmp".into());
    });
    for part in ["set -- 0 '';", "cd /tmp ", "MODE=vm MODE=mine make"] {
        assert!(line.contains(part), "{part}\n{line}");
    }

    let ssh = world.call::<VmSshConfig>(&ssh_config("web")).unwrap();
    assert_eq!(
        (ssh.user.as_str(), ssh.workdir.as_deref()),
        ("dev", Some("/srv/app"))
    );
    assert_eq!(
        ssh.env_file.as_deref(),
        Some("/etc/profile.d/fcd-environment.sh")
    );

    world.shut();
    let state = &world.config.state_dir;
    assert_eq!(holders(state), ["environment", "seed"]);
    let file = world.vm_dir(&vm.id).join("environment");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    world.reopen();
    world.delete("web").unwrap();
    assert_eq!(holders(&world.config.state_dir), [""; 0]);
}

#[test]
fn login_shell_of_a_guest_runtime_gets_the_settings() {
    let world = World::new();
    make_image_of(&world.config.state_dir, "small", "app", None);
    make_runtime(&world.config.state_dir, "00000000000a", 7);
    let vm = start(&world, &with_defaults("web", Some("small")));
    let seed = std::fs::read(world.vmm.last_spec(&vm.id).unwrap().seed).unwrap();
    let settings = "user=dev:staff\0working_dir=/srv/app\0env=TOKEN=s3cret-value\0env=MODE=vm\0";
    assert!(String::from_utf8_lossy(&seed).contains(settings));
    let line = exec(&world, "web", |_| {});
    assert!(line.starts_with("#fcd-user dev:staff\n"), "{line}");
    assert!(!line.contains(SECRET), "{line}");
}

#[test]
fn forks_and_snapshots_keep_the_defaults() {
    let world = World::new();
    start(&world, &with_defaults("web", None));
    let fork = VmForkRequest {
        vm: "web".into(),
        name: Some("twin".parse().unwrap()),
        ..Default::default()
    };
    let save = SnapshotCreateRequest {
        vm: "web".into(),
        name: Some("one".parse().unwrap()),
    };
    world.run::<VmFork>(fork).unwrap();
    world.run::<SnapshotCreate>(save).unwrap();
    world.delete("web").unwrap();
    let restore = SnapshotRestoreRequest {
        snapshot: "one".into(),
        new_vm: Some("again".parse().unwrap()),
    };
    world.run::<SnapshotRestore>(restore).unwrap();
    for vm in ["twin", "again"] {
        let line = exec(&world, vm, |_| {});
        assert!(line.contains("TOKEN=s3cret-value MODE=vm"), "{vm}: {line}");
    }
}

#[test]
fn refused_vm_leaves_no_variables() {
    let world = World::new();
    world.create("web");
    let taken = world.call::<VmCreate>(&with_defaults("web", None));
    assert!(taken.unwrap_err().is(Kind::NameTaken));
    for change in [
        (|r: &mut VmCreateRequest| r.user = Some("a:b:c".into())) as fn(&mut VmCreateRequest),
        |r| r.workdir = Some("relative".into()),
        |r| r.env.push(("1".into(), String::new())),
        |r| r.env.push(("A".into(), "x".repeat(1 << 17))),
    ] {
        let mut request = with_defaults("other", None);
        change(&mut request);
        let e = world.call::<VmCreate>(&request).unwrap_err();
        assert!(e.is(Kind::InvalidArgument) && e.fault.hint.is_some(), "{e}");
    }
    assert_eq!(holders(&world.config.state_dir), [""; 0]);
}
