//! Runs a command as a user of the guest other than the one who logs in.
//!
//! The guest's shell itself reads `/etc/passwd` and `/etc/group`, as docker does, and setpriv(1),
//! which every Debian system has, changes the ids. No other program is started, because that takes
//! 50 ms under emulation.

use crate::error::{Error, Result};
use crate::host::shell::quote;
use crate::host::text::quoted;

/// Exit status if the guest has no such user, group or working directory.
pub(super) const CANNOT_BEGIN_STATUS: u8 = 125;
/// The greatest id that docker accepts.
const ID_MAX: u32 = i32::MAX as u32;

/// A user of the guest in the form `USER[:GROUP]`. Both are names or numbers. A number needs no
/// entry in the guest's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestUser {
    user: String,
    group: Option<String>,
}

impl GuestUser {
    /// The words before a command that runs as the user that [`Self::look_up`] found.
    pub(super) const BECOME: &str =
        r#" setpriv --reuid="$uid" --regid="$gid" --groups="$gid$groups" --"#;

    /// # Errors
    /// `invalid_argument` if a part is empty, too long, or not a name or number.
    pub fn parse(text: &str) -> Result<Self> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let part = |part: &str| {
            checked(part).ok_or_else(|| {
                Error::invalid(format!("{} is not a user", quoted(text))).hint(
                    "give USER or USER:GROUP, each a name or a number, such as dev or 1000:1000",
                )
            })
        };
        Ok(Self {
            user: part(user)?,
            group: group.map(part).transpose()?,
        })
    }

    /// Returns the line that makes the login shell of a guest runtime run the commands after it as
    /// this user. Every other shell takes it for a comment.
    pub fn line(&self) -> String {
        let group = self.group.iter().map(|group| format!(":{group}"));
        format!("#fcd-user {}{}\n", self.user, group.collect::<String>())
    }

    /// Returns shell commands that find the user's ids, set the variables that depend on the user,
    /// and change to the home directory. They exit if the guest does not have the user or group.
    pub(super) fn look_up(&self) -> String {
        format!(
            "set -- {} {}; {LOOK_UP}",
            quote(&self.user),
            quote(self.group.as_deref().unwrap_or_default())
        )
        .replace("@STATUS@", &CANNOT_BEGIN_STATUS.to_string())
    }
}

/// Returns the name, or the number in its shortest form.
fn checked(part: &str) -> Option<String> {
    const BYTES_MAX: usize = 256;
    if part.bytes().all(|b| b.is_ascii_digit()) {
        let id: u32 = part.parse().ok()?;
        return (id <= ID_MAX).then(|| id.to_string());
    }
    let is_name = part.len() <= BYTES_MAX && !part.contains(|c: char| c == ':' || c.is_control());
    is_name.then(|| part.to_owned())
}

/// Finds the user $1 and the group $2, which may be empty. As with docker, the supplementary groups
/// are those of the user's name, and there are none if a group is given. A terminal belongs to root
/// at first, so it is given to the user, as docker does.
const LOOK_UP: &str = r#"uid= gid= name= home=/ shell= groups=
while IFS=: read -r n x u g x h s || [ -n "$n" ]; do
if [ "$n" = "$1" ] || [ "$u" = "$1" ]; then uid=$u gid=$g name=$n home=$h shell=$s; break; fi
done </etc/passwd
if [ -z "$uid" ]; then
case $1 in *[!0-9]*) printf 'fcd: the guest has no user %s\n' "$1" >&2; exit @STATUS@;; esac
uid=$1 gid=0
fi
if [ -n "$2" ]; then
gid=
while IFS=: read -r n x g x || [ -n "$n" ]; do
if [ "$n" = "$2" ] || [ "$g" = "$2" ]; then gid=$g; break; fi
done </etc/group
if [ -z "$gid" ]; then
case $2 in *[!0-9]*) printf 'fcd: the guest has no group %s\n' "$2" >&2; exit @STATUS@;; esac
gid=$2
fi
elif [ -n "$name" ]; then
while IFS=: read -r n x g x || [ -n "$n" ]; do
case ,$x, in *,"$name",*) groups=$groups,$g;; esac
done </etc/group
fi
export HOME="$home" SHELL="${shell:-/bin/sh}"
if [ -n "$name" ]; then export USER="$name" LOGNAME="$name"; else unset USER LOGNAME; fi
unset MAIL
[ ! -t 0 ] || chown "$uid" /proc/self/fd/0 2>/dev/null || :
cd "$home" 2>/dev/null || cd /
"#;

#[cfg(test)]
mod tests {
    use super::super::command_line::command_bytes;
    use super::*;
    use crate::host::command::{Command, Output, run_any_status};
    use crate::locks::Cancel;
    use std::os::unix::fs::PermissionsExt;

    /// Runs a line with a `setpriv` that prints its options and runs the command.
    fn run(user: &str, argv: &[&str], workdir: Option<&str>) -> Output {
        let bin = tempfile::tempdir().unwrap();
        let program = bin.path().join("setpriv");
        let script = "#!/bin/sh\nwhile [ \"$1\" != -- ]; do printf '%s\\n' \"$1\"; shift; done\nshift; exec \"$@\"\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let argv: Vec<Vec<u8>> = argv.iter().map(|w| w.as_bytes().to_vec()).collect();
        let user = GuestUser::parse(user).unwrap();
        let line = command_bytes(&argv, &[], workdir.map(str::as_bytes), Some(&user)).unwrap();
        let path = format!(
            "{}:{}",
            bin.path().display(),
            std::env::var("PATH").unwrap()
        );
        let outputs: Vec<Output> = ["/bin/dash", "/bin/bash"]
            .into_iter()
            .map(|shell| {
                let command = Command::new(shell)
                    .arg("-c")
                    .arg(std::str::from_utf8(&line).unwrap())
                    .env("PATH", &path)
                    .env("USER", "root")
                    .env("MAIL", "/var/mail/root");
                run_any_status(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap()
            })
            .collect();
        assert_eq!(outputs[0].stdout, outputs[1].stdout);
        outputs.into_iter().next().unwrap()
    }

    #[track_caller]
    fn check(user: &str, workdir: Option<&str>, expected: &str) {
        let script = "echo \"$HOME $SHELL ${USER-none} ${LOGNAME-none} ${MAIL-none}\"; pwd";
        let output = run(user, &["sh", "-c", script], workdir);
        assert_eq!(
            (
                output.status,
                String::from_utf8(output.stdout).unwrap().as_str()
            ),
            (0, expected),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Debian's base-passwd has these users and groups on every host.
    #[test]
    fn user_gets_ids_variables_and_directory() {
        check(
            "root",
            Some("/usr"),
            "--reuid=0\n--regid=0\n--groups=0\n/root /bin/bash root root none\n/usr\n",
        );
        let games = "/usr/games /usr/sbin/nologin games games none\n";
        let at = |ids: &str| format!("{ids}\n{games}/\n");
        for user in ["games", "5", "05"] {
            check(user, Some("/"), &at("--reuid=5\n--regid=60\n--groups=60"));
        }
        for user in ["games:tty", "5:5"] {
            check(user, Some("/"), &at("--reuid=5\n--regid=5\n--groups=5"));
        }
        for (user, gid) in [("4242", 0), ("4242:17", 17), ("4242:daemon", 1)] {
            let ids = format!("--reuid=4242\n--regid={gid}\n--groups={gid}");
            check(user, None, &format!("{ids}\n/ /bin/sh none none none\n/\n"));
        }
    }

    #[test]
    fn unknown_user_or_group_is_reported() {
        for (user, said) in [
            ("no'such", "fcd: the guest has no user no'such\n"),
            ("root:no such", "fcd: the guest has no group no such\n"),
        ] {
            let output = run(user, &["true"], None);
            assert_eq!(
                (
                    output.status,
                    String::from_utf8(output.stderr).unwrap().as_str()
                ),
                (i32::from(CANNOT_BEGIN_STATUS), said)
            );
        }
    }

    #[test]
    fn statuses_of_the_command_are_kept() {
        for (argv, status) in [
            (&["sh", "-c", "exit 7"][..], 7),
            (&["no-such-command"], 127),
            (&["sh", "-c", "kill $$"], 143),
        ] {
            assert_eq!(run("root", argv, None).status, status, "{argv:?}");
        }
    }

    #[test]
    fn malformed_user_is_refused() {
        for text in [
            "",
            ":",
            "a:",
            ":a",
            "a:b:c",
            "a\nb",
            "4294967295",
            "99999999999",
        ] {
            assert!(GuestUser::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(
            GuestUser::parse("007:dev").unwrap(),
            GuestUser {
                user: "7".into(),
                group: Some("dev".into())
            }
        );
    }
}
