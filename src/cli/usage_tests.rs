//! Tests of the hints for command lines that clap cannot use.

use super::super::context::{Context, Stdio};
use super::super::signals::SignalSource;
use super::super::tests::{NOW_S, check, fcctl, file_with, two_vms};
use expect_test::expect;
use std::io::Seek;

/// clap shows the message of a value parser's error, but not its hint.
#[test]
fn hint_of_value_parser_is_shown() {
    let fake = two_vms();
    check(
        &fake,
        &["image", "pull", "docker-daemon:app"],
        expect![[r#"
            ! fcctl: invalid value 'docker-daemon:app' for '<REF>': fcctl cannot read from docker-daemon
            ! hint: docker save app | fcctl image pull -
            status 2
        "#]],
    );
    check(
        &fake,
        &["--json", "image", "pull", "docker-daemon:app"],
        expect![[r#"
            ! {"error":{"code":"invalid_argument","exit_status":2,"hint":"docker save app | fcctl image pull -","kind":"invalid_argument","message":"invalid value 'docker-daemon:app' for '<REF>': fcctl cannot read from docker-daemon","retryable":false}}
            status 2
        "#]],
    );
    check(
        &fake,
        &["run", "--name", "Web", ".", "--", "make"],
        expect![[r#"
            ! fcctl: invalid value 'Web' for '--name <NAME>': VM name "Web" is not valid
            ! hint: use 1 to 32 characters from a-z, 0-9 and -; begin with a letter and do not end with -
            status 125
        "#]],
    );
    check(
        &fake,
        &["--json", "vm", "show"],
        expect![[r#"
        ! {"error":{"code":"invalid_argument","exit_status":2,"hint":"fcctl --help","kind":"invalid_argument","message":"the following required arguments were not provided: <VM>...","retryable":false}}
        status 2
    "#]],
    );
}

#[test]
fn words_of_docker_have_hints() {
    let fake = two_vms();
    check(
        &fake,
        &["reboot", "web"],
        expect![[r#"
        ! fcctl: unrecognized subcommand 'reboot'
        ! hint: fcctl restart VM
        status 2
    "#]],
    );
    check(
        &fake,
        &["scp", "a", "web:/b"],
        expect![[r#"
        ! fcctl: unrecognized subcommand 'scp'
        ! hint: into a VM: fcctl cp FILE VM:DIR
        ! hint: out of a VM: fcctl cp VM:FILE DIR
        ! hint: a tree, and its changes back: fcctl workspace prepare VM PATH
        status 2
    "#]],
    );
    check(
        &fake,
        &["image", "save", "app"],
        expect![[r#"
        ! fcctl: unrecognized subcommand 'save'
        ! hint: fcctl image export IMAGE -o FILE
        status 2
    "#]],
    );
    check(
        &fake,
        &["--json", "rmi", "alpine"],
        expect![[r#"
        ! {"error":{"code":"invalid_argument","exit_status":2,"hint":"fcctl image rm IMAGE","kind":"invalid_argument","message":"unrecognized subcommand 'rmi'","retryable":false}}
        status 2
    "#]],
    );
    for (args, says) in [
        (&["run", "-d", "--image", "app"][..], "fcctl create NAME"),
        (
            &["run", "-v", "/a:/b", "."],
            "fcctl workspace prepare VM DIR",
        ),
        (&["create", "--network", "host"], "--net none"),
        (&["exec", "web", "--privileged", "ls"], "leave it out"),
    ] {
        let ran = fcctl(&fake, args);
        assert!(ran.err.contains(says), "{args:?} {}", ran.err);
    }
    // clap's own suggestion remains for other words.
    let ran = fcctl(&fake, &["statr", "web"]);
    assert!(
        ran.err.contains("tip: ") && ran.err.contains("'start'"),
        "{}",
        ran.err
    );
}

#[test]
fn image_build_explains_dockerfiles() {
    let fake = two_vms();
    for args in [
        &["."][..],
        &["-t", "app", "."],
        &["--tag=app", "."],
        &["app", "./dir"],
        &["--build-arg", "A=b", "/dir"],
    ] {
        let args = [&["image", "build"], args].concat();
        let ran = fcctl(&fake, &args);
        assert_eq!(ran.status, 2);
        assert!(
            ran.err.contains("reads no Dockerfile") && ran.err.contains("docker save app"),
            "{args:?} {}",
            ran.err
        );
    }
    let ran = fcctl(&fake, &["image", "build", "app", "--from", "./x"]);
    assert!(!ran.err.contains("Dockerfile"), "{}", ran.err);
    assert_eq!(fake.methods(), "");
}

#[test]
fn run_without_separator_says_what_to_write() {
    let fake = two_vms();
    check(
        &fake,
        &["run", "alpine", "ls", "a b"],
        expect![[r#"
        ! fcctl: "alpine" is not a directory
        ! hint: if it is an image: fcctl --socket DIR/fcd.sock run --image alpine ls 'a b'
        ! hint: to copy a directory, name it: fcctl --socket DIR/fcd.sock run . -- ls 'a b'
        status 125
    "#]],
    );
    check(
        &fake,
        &["run", "-it", "ghcr.io/a/b:1", "--rm", "sh"],
        expect![[r#"
            ! fcctl: "ghcr.io/a/b:1" is not a directory
            ! hint: if it is an image: fcctl --socket DIR/fcd.sock run -it --rm --image ghcr.io/a/b:1 sh
            ! hint: to copy a directory, name it: fcctl --socket DIR/fcd.sock run -it . --rm -- sh
            status 125
        "#]],
    );
    check(
        &fake,
        &["run", "alpine", "--", "ls", "a b"],
        expect![[r#"
            ! fcctl: alpine does not exist
            ! hint: if it is an image: fcctl run --image alpine ls 'a b'
            ! hint: to copy a directory, name it: fcctl run . -- ls 'a b'
            status 125
        "#]],
    );
    check(
        &fake,
        &["run", "./absent", "--", "ls"],
        expect![[r#"
        ! fcctl: ./absent does not exist
        ! hint: pass an existing directory, such as . for this one
        status 125
    "#]],
    );
}

#[test]
fn no_words_print_help() {
    let mut err = tempfile::tempfile().unwrap();
    let mut out = tempfile::tempfile().unwrap();
    let stdio = Stdio {
        stdin: file_with(b""),
        stdout: out.try_clone().unwrap(),
        stderr: err.try_clone().unwrap(),
    };
    let signals = SignalSource::Channel(crossbeam_channel::never());
    let mut ctx = Context::new(stdio, signals, Box::new(|_| None), NOW_S).unwrap();
    assert_eq!(super::super::command(&mut ctx, &["fcctl".into()]), 0);
    out.rewind().unwrap();
    err.rewind().unwrap();
    let help = std::io::read_to_string(out).unwrap();
    assert!(
        help.contains("Usage: fcctl") && help.contains("Topics"),
        "{help}"
    );
    assert_eq!(std::io::read_to_string(err).unwrap(), "");
}
