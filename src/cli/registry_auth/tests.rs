//! Tests with configurations and helpers of docker that each test creates.

use super::*;
use crate::api::registry::Secret;
use crate::error::Kind;
use crate::host::command::Output;
use std::os::unix::fs::PermissionsExt;

struct Home(tempfile::TempDir);

impl Home {
    fn new(config: &str) -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        std::fs::write(home.0.path().join("config.json"), config).unwrap();
        home
    }

    /// Adds a helper, which is a shell script.
    fn helper(self, name: &str, script: &str) -> Self {
        let path = self.0.path().join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn caller(&self) -> Caller {
        let dir = self.0.path().to_str().unwrap().to_owned();
        let path = format!("{dir}:/usr/bin:/bin");
        let environment = vec![("PATH".into(), path.into()), ("MARK".into(), "kept".into())];
        let env = move |name: &str| (name == "DOCKER_CONFIG").then(|| dir.clone());
        Caller::new(&env, environment)
    }

    fn find(&self, registry: &str) -> Result<Credential> {
        find(registry, &self.caller(), &Cancel::try_new().unwrap())
    }

    #[track_caller]
    fn fails(&self, registry: &str, kind: Kind) -> String {
        let e = self.find(registry).unwrap_err();
        assert_eq!(e.kind(), kind, "{e:?}");
        assert!(!format!("{e:?}").contains("canary"), "{e:?}");
        assert!(e.hint_text().is_some(), "{e:?}");
        e.to_string()
    }
}

fn basic(user: &str, password: &str) -> Credential {
    Credential::Basic {
        user: user.into(),
        password: Secret::new(password),
    }
}

fn identity(token: &str) -> Credential {
    Credential::Identity {
        token: Secret::new(token),
    }
}

#[test]
fn directory_is_docker_config_or_in_home() {
    let directory = |vars: &'static [(&str, &str)]| {
        let env = move |name: &str| {
            let found = vars.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Caller::new(&env, Vec::new()).directory
    };
    let both = directory(&[("DOCKER_CONFIG", "/d"), ("HOME", "/h")]);
    assert_eq!(both, Some("/d".into()));
    let empty = directory(&[("DOCKER_CONFIG", ""), ("HOME", "/h")]);
    assert_eq!(empty, Some("/h/.docker".into()));
    assert_eq!(directory(&[]), None);
}

#[test]
fn missing_configuration_is_anonymous() {
    let home = Home::new("");
    assert_eq!(home.find("r").unwrap(), Credential::Anonymous);
    std::fs::remove_file(home.0.path().join("config.json")).unwrap();
    assert_eq!(home.find("r").unwrap(), Credential::Anonymous);
    let nowhere = Caller::new(&|_: &str| None, Vec::new());
    let found = find("r", &nowhere, &Cancel::try_new().unwrap()).unwrap();
    assert_eq!(found, Credential::Anonymous);
}

#[test]
fn stored_credentials_are_found_by_host() {
    // ann:canary, with and without padding.
    let home = Home::new(
        r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "YW5uOmNhbmFyeQ=="},
            "https://url.example/v2/": {"auth": "YW5uOmNhbmFyeQ"},
            "r:5000": {"username": "bob", "password": "canary"},
            "token.example": {"auth": "YW5uOg==", "identitytoken": "canary"},
            "colons.example": {"auth": "YTpiOmM="},
            "empty.example": {},
            "other.example/path": {"auth": "YW5uOmNhbmFyeQ=="}
        }, "HttpHeaders": {"x": "y"}, "psFormat": 1}"#,
    );
    for (registry, credential) in [
        ("docker.io", basic("ann", "canary")),
        ("index.docker.io", basic("ann", "canary")),
        ("url.example", basic("ann", "canary")),
        ("r:5000", basic("bob", "canary")),
        ("token.example", identity("canary")),
        ("colons.example", basic("a", "b:c")),
        ("other.example", basic("ann", "canary")),
        ("empty.example", Credential::Anonymous),
        ("r", Credential::Anonymous),
        ("r:5001", Credential::Anonymous),
        ("example", Credential::Anonymous),
    ] {
        assert_eq!(home.find(registry).unwrap(), credential, "{registry}");
    }
}

#[test]
fn malformed_configuration_is_refused_without_its_secrets() {
    for config in [
        "canary",
        "[]",
        r#"{"auths": "canary"}"#,
        r#"{"auths": {"r": "canary"}}"#,
        r#"{"auths": {"r": {"auth": ["canary"]}}}"#,
        r#"{"auths": {"r": {"auth": "canary!"}}}"#,
        r#"{"auths": {"r": {"auth": "Y2FuYXJ5"}}}"#,
        r#"{"credsStore": 1}"#,
    ] {
        let home = Home::new(config);
        let text = home.fails("r", Kind::InvalidConfig);
        assert!(text.contains("/config.json is not usable"), "{text}");
    }
    let large = Home::new(&" ".repeat(5 << 20));
    large.fails("r", Kind::InvalidConfig);
}

#[test]
fn other_files_than_regular_ones_are_refused_at_once() {
    let home = Home::new("");
    let path = home.0.path().join("config.json");
    std::fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    home.fails("r", Kind::InvalidConfig);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    home.fails("r", Kind::InvalidConfig);
}

#[test]
fn helper_gets_registry_and_environment() {
    let home = Home::new(r#"{"credsStore": "test", "auths": {"r": {"auth": "YTpi"}}}"#).helper(
        "test",
        r#"printf '{"ServerURL":"x","Username":"%s","Secret":"%s %s"}' "$(cat)" "$1" "$MARK""#,
    );
    assert_eq!(home.find("r").unwrap(), basic("r", "get kept"));
    let hub = home.find("docker.io").unwrap();
    assert_eq!(hub, basic("https://index.docker.io/v1/", "get kept"));
}

#[test]
fn helper_of_registry_takes_precedence() {
    let home = Home::new(
        r#"{"credsStore": "all", "credHelpers": {"r": "one", "docker.io": "one", "none": ""}}"#,
    )
    .helper("all", r#"echo '{"Username":"all","Secret":"x"}'"#)
    .helper("one", r#"echo '{"Username":"<token>","Secret":"t"}'"#);
    assert_eq!(home.find("r").unwrap(), identity("t"));
    assert_eq!(home.find("docker.io").unwrap(), identity("t"));
    assert_eq!(home.find("other").unwrap(), basic("all", "x"));
    // An empty helper name means the configuration file, as in docker.
    assert_eq!(home.find("none").unwrap(), Credential::Anonymous);
}

#[test]
fn helper_without_credential_is_anonymous() {
    let home = Home::new(r#"{"credsStore": "test"}"#).helper(
        "test",
        "cat >/dev/null; echo credentials not found in native keychain; exit 1",
    );
    assert_eq!(home.find("r").unwrap(), Credential::Anonymous);
}

#[test]
fn failing_helpers_are_named() {
    let config = r#"{"credsStore": "test"}"#;
    let home = Home::new(config).helper("test", "cat >/dev/null; echo the key is locked; exit 1");
    let text = home.fails("r", Kind::CommandFailed);
    assert_eq!(
        text,
        "docker-credential-test did not return the credential of r: status 1: the key is locked"
    );
    let home = Home::new(config).helper("test", r#"echo '{"Secret": ["canary"]}'"#);
    home.fails("r", Kind::CommandFailed);
    let home = Home::new(config).helper("test", r#"echo '{"Secret":"canary"}'; exit 3"#);
    home.fails("r", Kind::CommandFailed);
    let text = Home::new(config).fails("r", Kind::CommandMissing);
    assert!(
        text.starts_with("ask docker-credential-test for the credential of r"),
        "{text}"
    );
}

#[test]
fn names_of_helpers_stay_in_path() {
    for name in [
        "../x",
        "a/b",
        "-x",
        ".x",
        "a b",
        "a;b",
        "\u{e9}",
        &"a".repeat(65),
    ] {
        let home = Home::new(&format!(r#"{{"credsStore": "{name}"}}"#));
        home.fails("r", Kind::InvalidConfig);
    }
}

#[test]
fn large_output_of_helper_is_refused() {
    let output = Output {
        status: 0,
        stdout: b"{".repeat(1 << 20),
        stderr: Vec::new(),
    };
    assert!(helper::parse(&output).is_err());
}

#[test]
fn cancel_ends_a_helper() {
    let home = Home::new(r#"{"credsStore": "test"}"#).helper("test", "exec sleep 60");
    let cancel = Cancel::try_new().unwrap();
    cancel.cancel(crate::locks::CancelCause::Requested);
    let e = find("r", &home.caller(), &cancel).unwrap_err();
    assert_eq!(e.kind(), Kind::Cancelled);
}

fn stop() -> Cancel {
    Cancel::try_new().unwrap()
}

impl Home {
    fn store(&self, registry: &str) -> Result<Place> {
        let password = Secret::new("canary:1");
        store(registry, ("ann", &password), &self.caller(), &stop())
    }

    fn remove(&self, registry: &str) -> Result<bool> {
        remove(registry, &self.caller(), &stop())
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.0.path().join("config.json")).unwrap()
    }
}

#[test]
fn stored_credential_is_found_and_removed() {
    let home = Home::new(r#"{"psFormat": "x", "auths": {"other": {"auth": "YW5uOmI="}}}"#);
    let path = home.0.path().join("config.json");
    assert_eq!(home.store("r:5000").unwrap(), Place::File(path.clone()));
    assert_eq!(home.find("r:5000").unwrap(), basic("ann", "canary:1"));
    assert_eq!(home.find("other").unwrap(), basic("ann", "b"));
    assert!(home.text().contains("psFormat"), "{}", home.text());
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    assert!(home.remove("r:5000").unwrap());
    assert!(!home.remove("r:5000").unwrap());
    assert_eq!(home.find("r:5000").unwrap(), Credential::Anonymous);
    assert_eq!(home.find("other").unwrap(), basic("ann", "b"));
    assert!(home.text().contains("psFormat"), "{}", home.text());
}

#[test]
fn docker_hub_is_stored_under_the_name_that_docker_uses() {
    let home = Home::new("");
    std::fs::remove_file(home.0.path().join("config.json")).unwrap();
    home.store("docker.io").unwrap();
    assert!(home.text().contains(DOCKER_HUB_KEY), "{}", home.text());
    assert_eq!(
        home.find("index.docker.io").unwrap(),
        basic("ann", "canary:1")
    );
    assert!(home.remove("docker.io").unwrap());
}

#[test]
fn helper_stores_and_erases() {
    let script = "cat >$DOCKER_DIR/$1.in; case $1 in get) cat $DOCKER_DIR/store.in 2>/dev/null || \
        { echo credentials not found in native keychain; exit 1; };; erase) rm $DOCKER_DIR/store.in;; esac";
    let home = Home::new(r#"{"credsStore": "safe"}"#);
    let script = script.replace("$DOCKER_DIR", home.0.path().to_str().unwrap());
    let home = home.helper("safe", &script);
    assert!(!home.remove("r").unwrap());
    let place = home.store("r").unwrap();
    assert_eq!(place, Place::Helper("docker-credential-safe".to_owned()));
    assert!(!home.text().contains("canary"), "{}", home.text());
    assert_eq!(home.find("r").unwrap(), basic("ann", "canary:1"));
    assert!(home.remove("r").unwrap());
    assert_eq!(home.find("r").unwrap(), Credential::Anonymous);
}

#[test]
fn failing_helper_or_malformed_file_stores_nothing() {
    let home = Home::new(r#"{"credsStore": "shut"}"#).helper("shut", "echo it is locked; exit 2");
    let e = home.store("r").unwrap_err();
    assert_eq!(e.kind(), Kind::CommandFailed);
    assert!(e.to_string().contains("it is locked"), "{e}");
    assert_eq!(home.text(), r#"{"credsStore": "shut"}"#);
    let home = Home::new("[");
    assert_eq!(home.store("r").unwrap_err().kind(), Kind::InvalidConfig);
    assert_eq!(home.text(), "[");
}

#[test]
fn file_behind_a_link_is_replaced_and_the_link_stays() {
    let home = Home::new("{}");
    let (link, target) = (
        home.0.path().join("config.json"),
        home.0.path().join("real"),
    );
    std::fs::rename(&link, &target).unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    home.store("r").unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert!(std::fs::read_to_string(&target).unwrap().contains("auths"));
}
