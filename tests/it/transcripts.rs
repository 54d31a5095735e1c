//! Commands that people type from habit, and the answers of the built fcctl: the status, stdout,
//! and stderr with `!` before each line.
//!
//! `src/cli/usage_tests.rs` and `src/cli/habits.rs` have those that need no daemon and no process.

use crate::world::*;
use expect_test::{Expect, expect};
use std::path::Path;
use std::process::{Command, Stdio};

mod tips;

const FCCTL: &str = env!("CARGO_BIN_EXE_fcctl");

struct Desk {
    world: World,
    home: tempfile::TempDir,
}

impl Desk {
    /// A daemon with the running VM `demo` and the new VM `db`, and a home with a directory.
    fn new() -> Self {
        let world = World::new();
        world.running("demo");
        world.create("db");
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("project")).unwrap();
        std::fs::write(home.path().join("project/notes"), "hello\n").unwrap();
        Self { world, home }
    }

    fn run(&self, line: &str) -> std::process::Output {
        let mut command = Command::new(FCCTL);
        let words = line.split(' ').skip(1).filter(|word| !word.is_empty());
        command.args(words).stdin(Stdio::null());
        command
            .current_dir(self.home.path())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.home.path())
            .env("FCD_SOCKET", &self.world.config.socket);
        command.output().unwrap()
    }

    /// Checks what a line prints. IDs and paths of this test are replaced.
    #[track_caller]
    fn check(&self, line: &str, expected: Expect) {
        let out = self.run(line);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (stdout, stderr) = (text(out.stdout), text(out.stderr));
        // How many stages of its progress a command shows depends on how long it takes.
        let is_progress = |l: &&str| out.status.success() && l.matches(": ").count() > 1;
        let stderr: String = stderr
            .lines()
            .filter(|l| !is_progress(l))
            .map(|l| format!("! {l}").trim_end().to_owned() + "\n")
            .collect();
        let status = out.status.code().unwrap();
        let whole = format!("$ {line}\n{stdout}{stderr}status {status}\n");
        let dir = self.world.config.socket.parent().unwrap();
        let whole = replaced(whole, self.home.path(), "HOME");
        let mut whole = replaced(whole, dir, "DIR");
        for vm in ["demo", "db"] {
            if let Ok(vm) = self.world.show(vm) {
                whole = whole.replace(vm.id.as_str(), &format!("ID-OF-{}", vm.name));
            }
        }
        expected.assert_eq(&whole);
    }
}

fn replaced(text: String, path: &Path, name: &str) -> String {
    text.replace(path.to_str().unwrap(), name)
}

#[test]
fn commands_run_without_separator() {
    let desk = Desk::new();
    desk.check(
        "fcctl exec demo uname",
        expect![[r#"
        $ fcctl exec demo uname
        status 0
    "#]],
    );
    desk.check(
        "fcctl exec demo -- uname",
        expect![[r#"
        $ fcctl exec demo -- uname
        status 0
    "#]],
    );
    desk.check(
        "fcctl exec -i demo uname",
        expect![[r#"
        $ fcctl exec -i demo uname
        status 0
    "#]],
    );
    desk.check(
        "fcctl exec -it demo uname",
        expect![[r#"
        $ fcctl exec -it demo uname
        status 0
    "#]],
    );
    desk.check(
        "fcctl exec -u dev -e A=b demo id",
        expect![[r#"
        $ fcctl exec -u dev -e A=b demo id
        status 0
    "#]],
    );
    desk.check(
        "fcctl exec demo",
        expect![[r#"
        $ fcctl exec demo
        ! fcctl: no command was given, and a shell needs a terminal on stdin and stdout
        ! hint: give a command (-- CMD), or pass a script on stdin with -i
        status 125
    "#]],
    );
    desk.check(
        "fcctl exec nosuch uname",
        expect![[r#"
        $ fcctl exec nosuch uname
        ! fcctl: no VM "nosuch"
        ! hint: list your VMs: fcctl ps -a
        status 125
    "#]],
    );
    desk.check(
        "fcctl exec db uname",
        expect![[r#"
        $ fcctl exec db uname
        ! fcctl: use VM db: it is created
        ! hint: start it first: fcctl start db
        status 125
    "#]],
    );
    desk.check(
        "fcctl exec",
        expect![[r#"
        $ fcctl exec
        ! fcctl: the following required arguments were not provided:
        !   <VM>
        !
        ! Usage: fcctl exec <VM> [-- <CMD>...]
        !
        ! For more information, try '--help'.
        status 125
    "#]],
    );
    desk.check(
        "fcctl run nosuch uname",
        expect![[r#"
        $ fcctl run nosuch uname
        ! fcctl: "nosuch" is not a directory
        ! hint: if it is an image: fcctl run --image nosuch uname
        ! hint: to copy a directory, name it: fcctl run . -- uname
        status 125
    "#]],
    );
    desk.check(
        "fcctl ssh",
        expect![[r#"
        $ fcctl ssh
        ! fcctl: the following required arguments were not provided:
        !   <VM>
        !
        ! Usage: fcctl ssh <VM> [-- <ARGS>...]
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
}

#[test]
fn vms_are_made_and_changed_by_docker_s_words() {
    let desk = Desk::new();
    desk.check(
        "fcctl create web",
        expect![[r#"
        $ fcctl create web
        web
        status 0
    "#]],
    );
    desk.check(
        "fcctl vm create web",
        expect![[r#"
        $ fcctl vm create web
        ! fcctl: the name web is taken
        ! hint: choose another name, or use it (fcctl ssh web), or delete it (fcctl rm -f web)
        status 4
    "#]],
    );
    desk.check("fcctl create Web", expect![[r#"
        $ fcctl create Web
        ! fcctl: invalid value 'Web' for '[NAME]': VM name "Web" is not valid
        ! hint: use 1 to 32 characters from a-z, 0-9 and -; begin with a letter and do not end with -
        status 2
    "#]]);
    desk.check(
        "fcctl create --name other web",
        expect![[r#"
        $ fcctl create --name other web
        ! fcctl: the argument '--name <NAME>' cannot be used with '[NAME]'
        !
        ! Usage: fcctl vm create --name <NAME> [NAME]
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
    desk.check(
        "fcctl create -m 512m --cpus 2 --label ci=yes --hostname build api",
        expect![[r#"
            $ fcctl create -m 512m --cpus 2 --label ci=yes --hostname build api
            api
            status 0
        "#]],
    );
    desk.check(
        "fcctl create --cpus many api2",
        expect![[r#"
        $ fcctl create --cpus many api2
        ! fcctl: invalid value 'many' for '--vcpus <N>': the number of vCPUs must be a whole number, such as 2
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
    desk.check("fcctl create -m huge api2", expect![[r#"
        $ fcctl create -m huge api2
        ! fcctl: invalid value 'huge' for '--memory <SIZE>': a size is a number with K, M, G or T, such as 512M or 2G
        !
        ! For more information, try '--help'.
        status 2
    "#]]);
    desk.check(
        "fcctl start demo demo",
        expect![[r#"
        $ fcctl start demo demo
        demo: running
        status 0
    "#]],
    );
    desk.check(
        "fcctl start nosuch",
        expect![[r#"
        $ fcctl start nosuch
        ! fcctl: no VM "nosuch"
        ! hint: list your VMs: fcctl ps -a
        status 3
    "#]],
    );
    desk.check(
        "fcctl rename web www",
        expect![[r#"
        $ fcctl rename web www
        web: renamed to www
        status 0
    "#]],
    );
    desk.check(
        "fcctl rename www",
        expect![[r#"
        $ fcctl rename www
        ! fcctl: the following required arguments were not provided:
        !   <NAME>
        !
        ! Usage: fcctl vm rename <VM> <NAME>
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
    desk.check(
        "fcctl port www",
        expect![[r#"
        $ fcctl port www
        status 0
    "#]],
    );
    desk.check(
        "fcctl port api 80",
        expect![[r#"
        $ fcctl port api 80
        ! fcctl: 80 is a port, and fcctl port lists the ports of VMs
        ! hint: to publish it: fcctl port add api 80
        status 3
    "#]],
    );
    desk.check(
        "fcctl pause demo",
        expect![[r#"
        $ fcctl pause demo
        demo: running (paused)
        status 0
    "#]],
    );
    desk.check(
        "fcctl resume demo",
        expect![[r#"
        $ fcctl resume demo
        demo: running
        status 0
    "#]],
    );
    desk.check(
        "fcctl kill db",
        expect![[r#"
        $ fcctl kill db
        ! fcctl: kill VM db: it is created
        ! hint: it is not running: see fcctl vm show db
        status 1
    "#]],
    );
    desk.check(
        "fcctl kill demo",
        expect![[r#"
        $ fcctl kill demo
        demo: stopped, the guest's data was not synced
        status 0
    "#]],
    );
    desk.check(
        "fcctl wait demo",
        expect![[r#"
        $ fcctl wait demo
        demo: stopped
        status 0
    "#]],
    );
    desk.check(
        "fcctl rm nosuch",
        expect![[r#"
        $ fcctl rm nosuch
        ! fcctl: no VM "nosuch"
        ! hint: list your VMs: fcctl ps -a
        status 3
    "#]],
    );
    desk.check(
        "fcctl rm www db",
        expect![[r#"
        $ fcctl rm www db
        www: deleted
        db: deleted
        status 0
    "#]],
    );
    desk.check(
        "fcctl stop --filter label=none",
        expect![[r#"
            $ fcctl stop --filter label=none
            ! fcctl: no VM matches label=none
            status 0
        "#]],
    );
}

#[test]
fn files_and_workspaces_have_errors_that_help() {
    let desk = Desk::new();
    desk.check(
        "fcctl cp project/notes demo",
        expect![[r#"
        $ fcctl cp project/notes demo
        ! fcctl: neither the source nor the destination is in a VM
        ! hint: name a path in a VM as VM:PATH, such as fcctl cp FILE web:/root/
        status 2
    "#]],
    );
    desk.check(
        "fcctl cp nosuch demo:/root",
        expect![[r#"
        $ fcctl cp nosuch demo:/root
        ! fcctl: nosuch: no such file or directory
        status 3
    "#]],
    );
    desk.check(
        "fcctl cp demo:/etc/hosts",
        expect![[r#"
        $ fcctl cp demo:/etc/hosts
        ! fcctl: cp needs a source and a destination
        ! hint: into a VM: fcctl cp FILE VM:DIR
        ! hint: out of a VM: fcctl cp VM:FILE DIR
        status 2
    "#]],
    );
    desk.check(
        "fcctl cp project/notes db:/root",
        expect![[r#"
        $ fcctl cp project/notes db:/root
        ! fcctl: use VM db: it is created
        ! hint: start it first: fcctl start db
        status 1
    "#]],
    );
    desk.check(
        "fcctl workspace prepare demo /nonexistent",
        expect![[r#"
            $ fcctl workspace prepare demo /nonexistent
            ! fcctl: /nonexistent does not exist
            ! hint: pass an existing directory, such as . for this one
            status 3
        "#]],
    );
    desk.check(
        "fcctl workspace prepare demo",
        expect![[r#"
        $ fcctl workspace prepare demo
        ! fcctl: the following required arguments were not provided:
        !   <PATH>
        !
        ! Usage: fcctl workspace prepare <VM> <PATH>
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
    desk.check(
        "fcctl workspace apply demo",
        expect![[r#"
        $ fcctl workspace apply demo
        ! fcctl: export from VM demo: it has no workspace
        ! hint: fcctl workspace prepare demo PATH
        status 3
    "#]],
    );
}

#[test]
fn images_are_listed_and_explained() {
    let desk = Desk::new();
    desk.check(
        "fcctl history default",
        expect![[r#"
        $ fcctl history default
        CREATED  LAYER  CREATED BY
        status 0
    "#]],
    );
    desk.check(
        "fcctl history nosuch",
        expect![[r#"
        $ fcctl history nosuch
        ! fcctl: there is no image nosuch
        ! hint: list images: fcctl image list, or pull one: fcctl image pull nosuch
        status 3
    "#]],
    );
    desk.check(
        "fcctl images nosuch",
        expect![[r#"
        $ fcctl images nosuch
        NAME  DIGEST  OS  KERNEL  DISK  ON HOST  BUILT  VMS
        status 0
    "#]],
    );
    desk.check(
        "fcctl image rm nosuch",
        expect![[r#"
        $ fcctl image rm nosuch
        ! fcctl: there is no image nosuch
        ! hint: list images: fcctl image list, or pull one: fcctl image pull nosuch
        status 3
    "#]],
    );
    desk.check(
        "fcctl image rm default",
        expect![[r#"
        $ fcctl image rm default
        ! fcctl: delete image default: it is used by 2 VMs
        ! hint: delete them first: fcctl ps -a, fcctl rm
        status 4
    "#]],
    );
    desk.check(
        "fcctl pull",
        expect![[r#"
        $ fcctl pull
        ! fcctl: the following required arguments were not provided:
        !   <REF>
        !
        ! Usage: fcctl image pull <REF>
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
    desk.check(
        "fcctl commit demo mine",
        expect![[r#"
        $ fcctl commit demo mine
        ! fcctl: VM demo is not stopped
        ! hint: stop it first: fcctl stop demo
        status 1
    "#]],
    );
    desk.check(
        "fcctl build -t mine .",
        expect![[r#"
        $ fcctl build -t mine .
        ! fcctl: fcctl image build reads no Dockerfile
        ! hint: build with docker or buildah, then: docker save app | fcctl image pull -
        ! hint: or: buildah push app oci-archive:app.tar && fcctl image pull oci-archive:app.tar
        ! hint: or write a script: fcctl image build --script FILE NAME
        status 2
    "#]],
    );
}

#[test]
fn every_list_is_an_array_and_every_single_object_an_object() {
    let desk = Desk::new();
    for (line, is_array) in [
        ("fcctl ps", true),
        ("fcctl ps -aq", true),
        ("fcctl vm list", true),
        ("fcctl images", true),
        ("fcctl image ls -q", true),
        ("fcctl kernel ls", true),
        ("fcctl snapshot ls", true),
        ("fcctl op ls -a", true),
        ("fcctl stats", true),
        ("fcctl system df", true),
        ("fcctl config show", true),
        ("fcctl port db", true),
        ("fcctl inspect demo db", true),
        ("fcctl ps --filter name=nosuch", true),
        ("fcctl stop --filter name=nosuch", true),
        ("fcctl debug locks", false),
        ("fcctl inspect demo", false),
        ("fcctl vm show --filter name=db", true),
        ("fcctl info", false),
        ("fcctl version", false),
        ("fcctl doctor", false),
        ("fcctl image show default", false),
        ("fcctl create made", false),
        ("fcctl set made --label ci", false),
        ("fcctl rename made done", false),
        ("fcctl rm done", false),
        ("fcctl system prune -n", false),
    ] {
        for json in ["--json", "--format json"] {
            let out = desk.run(&format!("{line} {json}"));
            // The commands that change something succeed only once.
            if !out.status.success() && json != "--json" {
                continue;
            }
            let value = serde_json::from_slice::<serde_json::Value>(&out.stdout);
            let value = value.unwrap_or_else(|e| panic!("{line} {json}: {e}: {out:?}"));
            assert_eq!(value.is_array(), is_array, "{line} {json}: {value}");
            assert_eq!(value.is_object(), !is_array, "{line} {json}: {value}");
        }
    }
}
