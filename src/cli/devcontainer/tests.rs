//! Tests whole command lines of `up` and `down` with a fake daemon.

use super::super::exec::tests::{begin, status};
use super::super::tests::{Ran, fcctl, vm};
use super::super::workspace::tests::{shown, take_stream, with_workspace};
use crate::api::vm::{Vm, VmState};
use crate::client::fake::{Fake, Request};
use crate::error::{Error, Kind};
use crate::ids::Labels;
use serde_json::{Value, json};
use std::path::PathBuf;

/// A project directory with a devcontainer.json.
struct Project {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Project {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app");
        std::fs::create_dir_all(path.join(".devcontainer")).unwrap();
        std::fs::write(path.join(".devcontainer/devcontainer.json"), text).unwrap();
        Self { _dir: dir, path }
    }

    /// Runs `fcctl VERB PATH ARGS...`.
    fn run(&self, fake: &Fake, verb: &str, args: &[&str]) -> Ran {
        let words = [&[verb, self.path.to_str().unwrap()], args].concat();
        let mut ran = fcctl(fake, &words);
        ran.err = ran.err.replace(self.path.to_str().unwrap(), "APP");
        ran
    }
}

/// Returns a VM of this user.
fn own(state: VmState) -> Vm {
    Vm {
        owner_uid: super::own_uid(),
        ..vm("web", state)
    }
}

/// The state of the daemon when a test begins.
#[derive(Clone, Copy)]
struct World {
    /// The state of the VM, if it exists.
    vm: Option<VmState>,
    owner_uid: Option<u32>,
    /// True if the name for the directory belongs to another VM.
    name_taken: bool,
    /// The status of the script that reports whether the VM is new.
    prepared: u8,
    /// The exit status of the other commands.
    command: u8,
}

impl Default for World {
    fn default() -> Self {
        Self {
            vm: None,
            owner_uid: None,
            name_taken: false,
            prepared: 3,
            command: 0,
        }
    }
}

fn up_world(world: World, text: &str) -> (Fake, Project) {
    let project = Project::new(text);
    (daemon(world, &project), project)
}

/// A daemon that has no VM, or only the VM of the project.
fn daemon(world: World, project: &Project) -> Fake {
    let path = project.path.to_str().unwrap();
    let labels: Labels = serde_json::from_value(json!({"fcd.directory": path})).unwrap();
    Fake::start(move |mut r: Request| match r.method.as_str() {
        "vm.list" => {
            let vm = world.vm.map(|state| Vm {
                labels: labels.clone(),
                ..own(state)
            });
            let vms: Vec<_> = vm.iter().map(Vm::brief).collect();
            r.result(json!({ "vms": vms }));
        }
        "vm.show" => match world.vm {
            Some(state) => {
                let mut vm = own(state);
                vm.owner_uid = world.owner_uid.unwrap_or(vm.owner_uid);
                r.result(json!({ "vm": vm }));
            }
            None => r.fault(Error::new(Kind::VmNotFound, "no such VM")),
        },
        "vm.create" => {
            if world.name_taken && !r.params["name"].is_null() {
                return r.fault(Error::new(Kind::NameTaken, "the name is taken"));
            }
            let ports = &r.params["ports"];
            if ports[0]["host_port"] == 22 {
                return r.fault(Error::new(Kind::PortTaken, "port 22 is in use"));
            }
            r.result(json!({"vm": own(VmState::Created)}));
        }
        "vm.start" | "vm.stop" | "vm.port_add" => {
            r.result(json!({"vm": own(VmState::Running), "ports": []}))
        }
        "image.show" => r.result(shown()),
        "workspace.prepare" => {
            let (_, entries) = take_stream(&mut r, &[]).unwrap();
            r.result(
                json!({"vm": with_workspace("web"), "kept": [], "entries": entries, "bytes": 1}),
            );
        }
        "exec.start" => {
            let is_question = r.params["argv"][2]
                .as_str()
                .is_some_and(|script| script.starts_with("umask"));
            let guest = begin(&mut r);
            drop(guest);
            let code = if is_question {
                world.prepared
            } else {
                world.command
            };
            r.result(status(code));
        }
        _ => r.result(json!({})),
    })
}

/// Returns the last word of each command that ran in the guest.
fn commands(calls: &[String]) -> Vec<String> {
    let starts = calls.iter().filter_map(|c| c.strip_prefix("exec.start "));
    starts
        .map(|params| {
            let params: serde_json::Value = serde_json::from_str(params).unwrap();
            let words = params["argv"].as_array().unwrap();
            let user = params["user"].as_str().unwrap_or("-");
            let last = words.last().unwrap().as_str().unwrap();
            let last = last.rsplit('\n').next().unwrap();
            format!("{user}: {last}")
        })
        .collect()
}

const FILE: &str = r#"{
    "image": "gcc:13", // A comment.
    "hostRequirements": {"cpus": 2, "memory": "1gb"},
    "forwardPorts": [3000],
    "containerEnv": {"A": "b"},
    "remoteUser": "dev",
    "initializeCommand": "touch /tmp/pwned",
    "postCreateCommand": "make deps",
    "postStartCommand": ["serve", "--all"],
}"#;

#[test]
fn up_creates_vm_as_described_in_file() {
    let (fake, project) = up_world(World::default(), FILE);
    let ran = project.run(&fake, "up", &["--yes"]);
    assert_eq!(
        (ran.status, ran.out.as_slice()),
        (0, &b"web\n"[..]),
        "{}",
        ran.err
    );
    let calls = fake.calls();
    let find = |method: &str| calls.iter().find(|c| c.starts_with(method)).unwrap();
    let create = find("vm.create");
    for part in [
        r#""image":"gcc:13""#,
        r#""vcpus":2"#,
        r#""mem_mib":1024"#,
        r#""guest_port":3000,"host_addr":"127.0.0.1","host_port":3000"#,
        r#""name":"app-"#,
        r#""env":[["A","b"]]"#,
        r#""labels":{"fcd.directory":"/"#,
        r#""user":"dev""#,
        r#""workdir":"/workspaces/app""#,
        r#""rm":false"#,
    ] {
        assert!(create.contains(part), "{part}: {create}");
    }
    assert!(find("workspace.prepare").contains(r#""guest_path":"/workspaces/app""#));
    assert_eq!(
        commands(&calls),
        [
            "0: /workspaces/app",
            "0: umask 022; mkdir -p /etc/profile.d && cat >/etc/profile.d/fcd-devcontainer.sh || exit 1; [ -e /var/lib/fcd-devcontainer ] || exit 3",
            "dev: make deps",
            "0: mkdir -p /var/lib && : >/var/lib/fcd-devcontainer",
            "dev: --all",
        ]
    );
    let shown: Vec<&str> = ran.err.lines().take(10).collect();
    assert_eq!(
        shown,
        [
            "fcctl: APP/.devcontainer/devcontainer.json asks for:",
            "fcctl:   image gcc:13",
            "fcctl:   2 vCPUs, 1 GiB of memory",
            "fcctl:   ports of the VM on 127.0.0.1: 3000",
            "fcctl:   variables A",
            "fcctl:   user dev",
            "fcctl:   a copy of this directory at /workspaces/app",
            "fcctl:   postCreateCommand: make deps",
            "fcctl:   postStartCommand: serve --all",
            "fcctl: initializeCommand is not run: nothing that a repository asks for runs on this host",
        ]
    );
    assert!(
        ran.err
            .ends_with("enter: fcctl ssh web, stop: fcctl down, delete: fcctl rm -f web\n"),
        "{}",
        ran.err
    );
}

#[test]
fn up_again_uses_the_same_vm() {
    for (state, prepared, expected) in [
        (VmState::Running, 0, 2),
        (VmState::Stopped, 0, 3),
        (VmState::Running, 3, 5),
    ] {
        let world = World {
            vm: Some(state),
            prepared,
            ..World::default()
        };
        let (fake, project) = up_world(world, FILE);
        let ran = project.run(&fake, "up", &["--yes"]);
        assert_eq!(ran.status, 0, "{}", ran.err);
        let calls = fake.calls();
        assert!(!calls.iter().any(|c| c.starts_with("vm.create")));
        assert_eq!(commands(&calls).len(), expected, "{calls:?}");
        assert!(
            ran.err.contains(
                "warning: VM web already exists and keeps its image, vCPUs, variables, user, ports"
            ),
            "{}",
            ran.err
        );
    }
}

#[test]
fn up_never_uses_vm_of_another_user() {
    let world = World {
        vm: Some(VmState::Running),
        owner_uid: Some(4242),
        ..World::default()
    };
    let (fake, project) = up_world(world, "{}");
    let ran = project.run(&fake, "down", &[]);
    assert_eq!(
        (ran.status, fake.methods().as_str()),
        (3, "vm.list vm.show")
    );
    assert!(ran.err.starts_with("fcctl: APP has no VM\n"), "{}", ran.err);
    let ran = project.run(&fake, "up", &["--yes"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(fake.calls().iter().any(|c| c.starts_with("vm.create")));
}

/// A VM that is not the project's has the name, for example because a user renamed it.
#[test]
fn up_chooses_another_name_if_its_own_is_taken() {
    let world = World {
        name_taken: true,
        ..World::default()
    };
    let (fake, project) = up_world(world, "{}");
    let ran = project.run(&fake, "up", &["--yes"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    let calls = fake.calls();
    let created: Vec<_> = calls
        .iter()
        .filter(|c| c.starts_with("vm.create"))
        .collect();
    assert!(
        created.len() == 2 && !created[1].contains("\"name\""),
        "{created:?}"
    );
}

#[test]
fn up_without_permission_does_nothing() {
    for (text, expected) in [
        (FILE, "there is no terminal to ask"),
        (
            r#"{"build": {"dockerfile": "x"}}"#,
            "build is not supported",
        ),
        (
            r#"{"containerEnv": {"A": "${localEnv:MINE}"}}"#,
            "which may be secrets: MINE",
        ),
        (
            r#"{"workspaceFolder": "/etc"}"#,
            "workspaceFolder: guest path",
        ),
        ("{", "not JSON"),
    ] {
        let (fake, project) = up_world(World::default(), text);
        let args: &[&str] = if text == FILE { &[] } else { &["--yes"] };
        let ran = project.run(&fake, "up", args);
        assert_eq!(
            (ran.status, fake.methods().as_str()),
            (2, ""),
            "{}",
            ran.err
        );
        assert!(
            ran.err.contains(expected) && ran.err.contains("hint: "),
            "{}",
            ran.err
        );
    }
}

#[test]
fn allowed_variable_goes_to_the_guest() {
    let text = r#"{"postCreateCommand": "login ${localEnv:MINE}"}"#;
    let (fake, project) = up_world(World::default(), text);
    let ran = project.run(&fake, "up", &["--yes", "--allow-env", "MINE"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(commands(&fake.calls()).contains(&"-: login from me".to_owned()));
}

#[test]
fn up_without_file_makes_vm_of_default_image() {
    let (fake, project) = up_world(World::default(), "{}");
    std::fs::remove_dir_all(project.path.join(".devcontainer")).unwrap();
    let ran = project.run(&fake, "up", &[]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    let calls = fake.calls();
    assert!(
        calls[1].starts_with(r#"vm.create {"hold":false,"labels":{"fcd.directory":"/"#),
        "{calls:?}"
    );
    let methods: Vec<&str> = calls.iter().map(|c| c.split(' ').next().unwrap()).collect();
    assert_eq!(
        methods.join(" "),
        "vm.list vm.create vm.start image.show workspace.prepare"
    );
}

#[test]
fn up_uses_free_ports_if_others_are_in_use() {
    let (fake, project) = up_world(World::default(), r#"{"forwardPorts": [22]}"#);
    let ran = project.run(&fake, "up", &["--yes"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(
        ran.err
            .contains("port 22 is in use; free ports are used instead"),
        "{}",
        ran.err
    );
}

#[test]
fn up_publishes_what_the_command_line_asks_for() {
    let publish = ["--yes", "-p", "auto", "-p", "9000:3000"];
    let (fake, project) = up_world(World::default(), r#"{"forwardPorts": [3000, 4000]}"#);
    let ran = project.run(&fake, "up", &publish);
    assert_eq!(ran.status, 0, "{}", ran.err);
    let create: Value = params(&fake, "vm.create");
    let port = |host: u16, guest: u16| json!({"guest_port": guest, "host_addr": "127.0.0.1", "host_port": host, "protocol": "tcp"});
    assert_eq!(create["auto_ports"], true);
    assert_eq!(create["ports"], json!([port(9000, 3000), port(4000, 4000)]));

    let world = World {
        vm: Some(VmState::Running),
        ..World::default()
    };
    let (fake, project) = up_world(world, "{}");
    let ran = project.run(&fake, "up", &publish);
    assert_eq!(ran.status, 0, "{}", ran.err);
    let add = params(&fake, "vm.port_add");
    assert_eq!(
        (&add["auto"], &add["ports"]),
        (&json!(true), &json!([port(9000, 3000)]))
    );
}

#[test]
fn up_says_where_automatic_ports_are() {
    let (fake, project) = up_world(World::default(), "{}");
    let ran = project.run(&fake, "up", &["--yes"]);
    let line = "fcctl: to forward whatever the VM listens on: fcctl port add web auto\n";
    assert!(ran.err.contains(line), "{}", ran.err);
}

/// Returns the parameters of the only call of a method.
fn params(fake: &Fake, method: &str) -> Value {
    let calls = fake.calls();
    let of_method = calls.iter().filter_map(|call| call.split_once(' '));
    let mut of_method = of_method.filter(|(name, _)| *name == method);
    let (Some((_, params)), None) = (of_method.next(), of_method.next()) else {
        panic!("{calls:?}");
    };
    serde_json::from_str(params).unwrap()
}

#[test]
fn failed_command_keeps_vm_and_is_run_again() {
    let world = World {
        command: 7,
        ..World::default()
    };
    let text = r#"{"postCreateCommand": "false"}"#;
    let (fake, project) = up_world(world, text);
    let ran = project.run(&fake, "up", &["--yes"]);
    assert_eq!(ran.status, 1, "{}", ran.err);
    assert!(
        ran.err.contains(
            "fcctl: postCreateCommand ended with status 7\nhint: look around: fcctl ssh web, then"
        ),
        "{}",
        ran.err
    );
    // The script that records the success of the commands did not run.
    assert_eq!(commands(&fake.calls()).len(), 2);
}

#[test]
fn later_commands_run_in_the_background() {
    let text = r#"{"waitFor": "updateContentCommand", "updateContentCommand": "a", "postCreateCommand": "b"}"#;
    let (fake, project) = up_world(World::default(), text);
    let ran = project.run(&fake, "up", &["--yes"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(
        ran.err
            .contains("postCreateCommand in the background; output: /tmp/fcd-devcontainer.log"),
        "{}",
        ran.err
    );
    let calls = fake.calls();
    assert!(
        calls
            .iter()
            .any(|c| c.contains("setsid") && c.contains(r#""no_wait_children":true"#))
    );
}

#[test]
fn down_stops_the_vm_of_the_directory() {
    let world = World {
        vm: Some(VmState::Running),
        ..World::default()
    };
    let (fake, project) = up_world(world, "{}");
    std::fs::create_dir(project.path.join("src")).unwrap();
    let ran = project.run(&fake, "down", &[]);
    assert_eq!(
        (ran.status, fake.methods().as_str()),
        (0, "vm.list vm.show vm.stop"),
        "{}",
        ran.err
    );
    let fake = daemon(World::default(), &project);
    let ran = project.run(&fake, "down", &[]);
    assert_eq!(ran.status, 3);
    assert!(ran.err.starts_with("fcctl: APP has no VM\n"), "{}", ran.err);
}
