//! Tests the answers of `fcctl __complete` with a fake daemon. `tests/it/completions.rs` runs the
//! shells.

use super::super::tests::vm;
use super::*;
use crate::api::vm::{Vm, VmState};
use crate::client::fake::Fake;
use serde_json::json;

fn daemon() -> Fake {
    Fake::start(|r| match r.method.as_str() {
        "vm.list" => {
            let paused = Vm {
                paused: true,
                ..vm("web-2", VmState::Running)
            };
            let web = Vm {
                labels: serde_json::from_str(r#"{"ci":"yes","owner":"ann"}"#).unwrap(),
                ..vm("web", VmState::Running)
            };
            let all = [web, paused, vm("db", VmState::Stopped)];
            r.result(json!({ "vms": all }));
        }
        "op.list" => r.result(json!({"ops": []})),
        _ => r.hang_up(),
    })
}

/// Completes the last word of a line, and returns the values.
fn complete_line(fake: &Fake, line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let index = (words.len() - 1).to_string();
    let question = ["fcctl", COMMAND, &index, "--"];
    let args: Vec<OsString> = question.iter().chain(&words).map(Into::into).collect();
    let text = answer(&args, &fake.socket(), None).unwrap();
    let values: Vec<&str> = text
        .lines()
        .map(|line| line.split('\t').next().unwrap())
        .collect();
    values.join(" ")
}

#[test]
fn vms_are_offered_by_their_state() {
    let fake = daemon();
    for (line, expected) in [
        ("fcctl start ", "db"),
        ("fcctl stop ", "web web-2"),
        ("fcctl vm pause ", "web"),
        ("fcctl resume ", "web-2"),
        ("fcctl ssh we", "web web-2"),
        ("fcctl vm show d", "db"),
        ("fcctl rm -f web ", "web web-2 db"),
        ("fcctl snapshot create ", "web web-2"),
        ("fcctl --json kill web-", "web-2"),
        ("fcctl ssh-config we", "web web-2"),
        ("fcctl port d", "db"),
        ("fcctl port add we", "web web-2"),
        ("fcctl port list d", "db"),
        ("fcctl vm ports rm d", "db"),
    ] {
        assert_eq!(complete_line(&fake, line), expected, "{line}");
    }
}

#[test]
fn filters_are_offered_term_by_term() {
    let fake = daemon();
    for (line, expected) in [
        ("fcctl ps --filter ", "label= state= name= image= id="),
        ("fcctl stop --filter la", "label="),
        ("fcctl rm --filter label=", "label=ci label=owner"),
        ("fcctl ps --filter label=owner=", "label=owner=ann"),
        ("fcctl ps --filter state=runn", "state=running"),
        ("fcctl ps --filter name=d", "name=db"),
        (
            "fcctl ps --filter state=running,label=c",
            "state=running,label=ci",
        ),
        ("fcctl ps --filter other=", ""),
    ] {
        assert_eq!(complete_line(&fake, line), expected, "{line}");
    }
}

#[test]
fn copies_are_offered_vms_and_files() {
    let fake = daemon();
    let dir = fake.dir().display();
    let (path, found) = (format!("fcctl cp {dir}/fcd"), format!("{dir}/fcd.sock"));
    for (line, expected) in [
        ("fcctl cp we", "web: web-2:"),
        ("fcctl vm cp -a a web-", "web-2:"),
        ("fcctl cp web:/ro", ""),
        (path.as_str(), found.as_str()),
    ] {
        assert_eq!(complete_line(&fake, line), expected, "{line}");
    }
    let both = complete_line(&fake, "fcctl cp ");
    assert!(
        both.starts_with("web: web-2: ") && both.contains("Cargo.toml"),
        "{both}"
    );
}

#[test]
fn words_of_the_command_line_are_offered() {
    let fake = daemon();
    for (line, expected) in [
        ("fcctl snap", "snapshot"),
        ("fcctl vm bal", "balloon"),
        ("fcctl run --net ", "nat none"),
        ("fcctl vm wait web --state st", "starting stopping stopped"),
        ("fcctl completions zs", "zsh"),
        // The call for the candidates fails, so none are offered.
        ("fcctl image show d", ""),
    ] {
        assert_eq!(complete_line(&fake, line), expected, "{line}");
    }
    assert!(complete_line(&fake, "fcctl run --im").contains("--image"));
}

#[test]
fn other_questions_are_not_answered() {
    for words in [
        &["fcctl", COMMAND][..],
        &["fcctl", COMMAND, "x", "--", "fcctl"],
        &["fcctl", COMMAND, "0", "fcctl"],
        &["fcctl", "ps"],
    ] {
        let args: Vec<OsString> = words.iter().map(Into::into).collect();
        assert_eq!(
            answer(&args, Path::new("/nonexistent"), None),
            None,
            "{words:?}"
        );
    }
}

#[test]
fn socket_of_the_line_is_used() {
    let words = |line: &str| -> Vec<OsString> { line.split(' ').map(Into::into).collect() };
    let of = |line: &str| socket_in(&words(line));
    assert_eq!(of("fcctl --socket /a ps"), Some("/a".into()));
    assert_eq!(of("fcctl ps --socket=/b"), Some("/b".into()));
    assert_eq!(of("fcctl ps"), None);
}
