//! Words of other tools that fcctl does not have.

use super::Desk;
use expect_test::expect;

/// Usage lines never show options that the environment sets.
#[test]
fn other_words_have_tips() {
    let desk = Desk::new();
    let mut helpless = Vec::new();
    for word in [
        "shell", "ls", "list", "delete", "remove", "unpause", "suspend", "ports", "show", "tag",
        "load", "save", "push", "copy", "prune", "restore", "update", "volume", "network", "ip",
        "console", "destroy", "launch", "init", "status", "diff", "search", "stop-all", "clone",
    ] {
        let out = desk.run(&format!("fcctl {word} demo"));
        let err = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{word}: {err}");
        // The environment has the socket, which is not part of what was typed.
        assert!(!err.contains("fcd.sock"), "{word}: {err}");
        if !err.contains("hint: ") && !err.contains("tip: ") {
            helpless.push(word);
        }
    }
    assert_eq!(helpless, [""; 0]);
    desk.check(
        "fcctl stop",
        expect![[r#"
        $ fcctl stop
        ! fcctl: the following required arguments were not provided:
        !   <VM>...
        !
        ! Usage: fcctl stop <VM>...
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
    desk.check(
        "fcctl ps --fromat json",
        expect![[r#"
        $ fcctl ps --fromat json
        ! fcctl: unexpected argument '--fromat' found
        !
        !   tip: a similar argument exists: '--format'
        !
        ! Usage: fcctl ps --format <TEMPLATE>
        !
        ! For more information, try '--help'.
        status 2
    "#]],
    );
    desk.check(
        "fcctl restore demo",
        expect![[r#"
        $ fcctl restore demo
        ! fcctl: unrecognized subcommand 'restore'
        ! hint: fcctl snapshot restore SNAPSHOT
        ! hint: the snapshots: fcctl snapshot list
        status 2
    "#]],
    );
    desk.check(
        "fcctl update demo",
        expect![[r#"
        $ fcctl update demo
        ! fcctl: unrecognized subcommand 'update'
        ! hint: fcctl set VM --memory 2G --vcpus 2
        status 2
    "#]],
    );
    desk.check("fcctl volume ls", expect![[r#"
        $ fcctl volume ls
        ! fcctl: unrecognized subcommand 'volume'
        ! hint: fcd copies directories and does not mount them: fcctl run DIR -- CMD
        ! hint: into a running VM: fcctl workspace prepare VM DIR, and back: fcctl workspace apply VM
        status 2
    "#]]);
    desk.check(
        "fcctl network ls",
        expect![[r#"
        $ fcctl network ls
        ! fcctl: unrecognized subcommand 'network'
        ! hint: for a new VM: fcctl create NAME --net nat, or --net none
        status 2
    "#]],
    );
    desk.check(
        "fcctl ip demo",
        expect![[r#"
        $ fcctl ip demo
        ! fcctl: unrecognized subcommand 'ip'
        ! hint: fcctl inspect -f '{{.IP}}' VM
        ! hint: published ports: fcctl port list VM
        status 2
    "#]],
    );
    desk.check(
        "fcctl console demo",
        expect![[r#"
            $ fcctl console demo
            ! fcctl: unrecognized subcommand 'console'
            ! hint: a VM has no command of its own to attach to, and its console takes no input
            ! hint: a shell: fcctl ssh VM
            ! hint: a command with a terminal: fcctl exec -it VM CMD
            ! hint: what the console shows: fcctl logs -f VM
            status 2
        "#]],
    );
    desk.check(
        "fcctl launch",
        expect![[r#"
        $ fcctl launch
        ! fcctl: unrecognized subcommand 'launch'
        ! hint: for one command: fcctl run DIR -- CMD
        ! hint: to stay: fcctl create NAME && fcctl start NAME
        status 2
    "#]],
    );
    desk.check(
        "fcctl diff demo",
        expect![[r#"
        $ fcctl diff demo
        ! fcctl: unrecognized subcommand 'diff'
        ! hint: the changes of a workspace: fcctl workspace export VM
        ! hint: into your directory: fcctl workspace apply VM
        status 2
    "#]],
    );
    desk.check(
        "fcctl clone demo",
        expect![[r#"
        $ fcctl clone demo
        ! fcctl: unrecognized subcommand 'clone'
        ! hint: fcctl fork VM NAME
        status 2
    "#]],
    );
    desk.check(
        "fcctl status",
        expect![[r#"
        $ fcctl status
        ! fcctl: unrecognized subcommand 'status'
        ! hint: fcd: fcctl info
        ! hint: a VM: fcctl inspect VM
        status 2
    "#]],
    );
}
