use super::super::tests::{check, fcctl, vm};
use super::*;
use crate::api::vm::Vm;
use crate::client::fake::Fake;
use crate::ids::Labels;
use expect_test::expect;
use serde_json::json;
use std::borrow::Cow;

fn labels(text: &str) -> Labels {
    serde_json::from_str(text).unwrap()
}

/// Starts a daemon with three VMs. Each call on one of them succeeds.
fn labelled() -> Fake {
    let vms = || {
        [
            Vm {
                labels: labels(r#"{"ci":"yes","owner":"ann, bob"}"#),
                ..vm("web", VmState::Running)
            },
            Vm {
                labels: labels(r#"{"ci":"no"}"#),
                image: "gcc:13".parse().unwrap(),
                ..vm("web-2", VmState::Stopped)
            },
            Vm {
                paused: true,
                ..vm("db", VmState::Running)
            },
        ]
    };
    Fake::start(move |r| {
        if r.method == "vm.list" {
            return r.result(json!({ "vms": vms() }));
        }
        let named = vms()
            .into_iter()
            .find(|vm| r.params["vm"] == vm.id.as_str())
            .unwrap_or_else(|| vm("other", VmState::Stopped));
        let id = named.id.clone();
        r.result(json!({"vm": named, "deleted": id}));
    })
}

#[test]
fn filter_chooses_vms_of_verbs() {
    let fake = labelled();
    check(
        &fake,
        &["stop", "--filter", "label=ci"],
        expect![[r#"
            > vm.list {"all":true,"brief":true}
            > vm.stop {"force":false,"vm":"000000776562"}
            > vm.stop {"force":false,"vm":"007765622d32"}
            web: running
            web-2: stopped
            status 0
        "#]],
    );
    check(
        &fake,
        &["rm", "-f", "--filter", "label=ci=no"],
        expect![[r#"
            > vm.list {"all":true,"brief":true}
            > vm.delete {"force":true,"if_exists":true,"vm":"007765622d32"}
            web-2: deleted
            status 0
        "#]],
    );
    for verb in [
        &["start"][..],
        &["restart"],
        &["kill"],
        &["pause"],
        &["resume"],
        &["wait"],
        &["inspect"],
        &["port"],
        &["stop"],
        &["rm"],
    ] {
        let ran = fcctl(&fake, &[verb, &["--filter", "name=db"]].concat());
        assert_eq!((ran.status, ran.err.as_str()), (0, ""), "{verb:?}");
        let calls = fake.calls();
        assert_eq!(calls.len(), 2, "{verb:?}");
        assert!(calls[1].contains(r#""vm":"000000006462""#), "{verb:?}");
    }
}

#[test]
fn filter_without_match_does_nothing() {
    let fake = labelled();
    check(
        &fake,
        &["rm", "-f", "--filter", "label=none,state=running"],
        expect![[r#"
            > vm.list {"all":true,"brief":true}
            ! fcctl: no VM matches label=none,state=running
            status 0
        "#]],
    );
    check(
        &fake,
        &["stop", "--json", "--filter", "label=none"],
        expect![[r#"
            > vm.list {"all":true,"brief":true}
            []
            status 0
        "#]],
    );
    // With `--filter`, even a single VM is printed as an array.
    let ran = fcctl(&fake, &["stop", "--json", "--filter", "label=ci=no"]);
    let document: serde_json::Value = serde_json::from_slice(&ran.out).unwrap();
    assert_eq!(document[0]["name"], "web-2");
}

#[test]
fn filter_is_refused_with_names_or_unknown_words() {
    let fake = labelled();
    let ran = fcctl(&fake, &["stop", "web", "--filter", "label=ci"]);
    assert!(
        ran.status == 2 && ran.err.contains("cannot be used with"),
        "{}",
        ran.err
    );
    check(
        &fake,
        &["rm", "-f", "--filter", "labels=ci"],
        expect![[r#"
            ! fcctl: invalid value 'labels=ci' for '--filter <KEY=VALUE>': "labels=ci" is not a filter
            ! hint: label=KEY, label=KEY=VALUE, state=STATE, name=NAME, image=IMAGE, id=ID
            status 2
        "#]],
    );
    check(
        &fake,
        &["rm", "-f", "--filter", ""],
        expect![[r#"
            ! fcctl: invalid value '' for '--filter <KEY=VALUE>': "" is not a filter
            ! hint: label=KEY, label=KEY=VALUE, state=STATE, name=NAME, image=IMAGE, id=ID
            status 2
        "#]],
    );
    check(
        &fake,
        &["stop", "--filter", "state=exited"],
        expect![[r#"
            ! fcctl: invalid value 'state=exited' for '--filter <KEY=VALUE>': "exited" is not a state
            ! hint: a state is one of created, starting, running, stopping, stopped, deleting, failed
            status 2
        "#]],
    );
    assert!(fake.calls().is_empty());
}

#[track_caller]
fn matches(filters: &[&str], expected: bool) {
    let brief = VmBrief {
        id: Cow::Owned("0123456789ab".parse().unwrap()),
        name: Cow::Owned("web-2".parse().unwrap()),
        state: VmState::Running,
        reason: None,
        image: Cow::Owned("ghcr.io/team/gcc:13".parse().unwrap()),
        short_digest: None,
        vcpus: 1,
        mem_mib: 1,
        disk_bytes: 1,
        created_at: 1,
        unresponsive: false,
        paused: true,
        ports: Cow::Borrowed(&[]),
        refused_ports: Vec::new(),
        ip: None,
        ip6: None,
        workspace: None,
        labels: labels(r#"{"ci":"yes","owner":"ann, name=bob","draft":""}"#),
    };
    let terms = filters.iter().map(|text| text.parse().unwrap()).collect();
    assert_eq!(Filter { terms }.matches(&brief), expected, "{filters:?}");
}

#[test]
fn filter_terms_combine_as_in_docker() {
    for filters in [
        &["label=ci"][..],
        &["label=ci=yes", "label=draft"],
        &["label=draft="],
        &["state=stopped", "status=running"],
        &["state=stopped,state=running,label=ci=yes"],
        &["state=paused"],
        &["name=web*"],
        &["name=db", "name=web-2"],
        &["image=ghcr.io/team/gcc"],
        &["ancestor=*:13"],
        &["id=0123"],
    ] {
        matches(filters, true);
    }
    for filters in [
        &["label=ci=no"][..],
        &["label=ci=yes", "label=none"],
        &["state=stopped"],
        &["name=web"],
        &["name=web-2", "state=stopped"],
        &["image=gcc"],
        &["id=123"],
    ] {
        matches(filters, false);
    }
}

#[test]
fn commas_of_values_do_not_end_terms() {
    let terms = |text: &str| text.parse::<Terms>().unwrap().terms.len();
    assert_eq!(terms("label=list=a,b,state=running"), 2);
    assert_eq!(terms("label=list=a, state=b"), 1);
    for bad in [
        "label",
        "label=",
        "a=b",
        ",label=a",
        "label=a b",
        "state=",
        "=x",
    ] {
        assert!(bad.parse::<Terms>().is_err(), "{bad}");
    }
}
