//! `fcctl up` and `down` with a real guest, and what its `devcontainer.json` sets for later
//! commands.

use crate::host::{Host, text};

#[test]
fn settings_of_the_file_hold_for_later_commands() {
    let host = Host::start();
    let dir = tempfile::tempdir().unwrap();
    let project = dir.path().join("app");
    std::fs::create_dir(&project).unwrap();
    crate::first_light::repository(&project);
    let port = 21_000 + std::process::id() % 1_000;
    let file = format!(
        r#"{{
            // A comment, and trailing commas.
            "containerEnv": {{"A": "it's", "B": "${{containerEnv:A}}!",}},
            "remoteEnv": {{"PATH": "${{containerEnv:PATH}}:/opt/x"}}, /* another */
            "remoteUser": "nobody",
            "forwardPorts": [{port},],
            "workspaceFolder": "/workspaces/place",
            "postCreateCommand": "echo \"$B\" >created",
            "postStartCommand": "id -un >>started",
        }}"#
    );
    std::fs::write(project.join(".devcontainer.json"), file).unwrap();
    let up = || {
        host.ok(&["up", "--yes", project.to_str().unwrap()])
            .trim()
            .to_owned()
    };
    let name = up();
    let look = r#"echo "$A|$B|$PATH|$(id -un)|$(pwd)"; cat created started"#;
    assert_eq!(
        host.ok(&["exec", &name, "sh", "-c", look]),
        "it's|it's!|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/x\
         |nobody|/workspaces/place\nit's!\nnobody\n"
    );
    let own = [
        "exec", "-e", "A=mine", "-u", "root", "-w", "/", &name, "sh", "-c", look,
    ];
    assert!(text(&host.fcctl(&own)).0.starts_with("mine|it's!|"));
    let ssh = [
        "ssh",
        "--user",
        "root",
        &name,
        r#"echo "$A|$(id -un)|$(pwd)""#,
    ];
    assert_eq!(host.ok(&ssh), "it's|root|/workspaces/place\n");
    assert_eq!(
        host.ok(&["port", &name]),
        format!("{port}/tcp -> 127.0.0.1:{port}\n")
    );

    assert_eq!(up(), name);
    host.ok(&["rename", &name, "other"]);
    assert_eq!(up(), "other");
    assert_eq!(host.ok(&["ps", "-aq"]).lines().count(), 1);
    assert_eq!(host.sh("other", "cat started"), "nobody\n");
    host.ok(&["down", project.to_str().unwrap()]);
    assert_eq!(host.show("other", "state"), "stopped");
}
