//! Reads passwd(5) and group(5) of an image.
//!
//! A static program has no name service, and the files belong to the image, so they are parsed
//! here: any bytes are accepted, and a line that has another form is skipped.

/// The user and the groups of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub uid: u32,
    pub gid: u32,
    /// The supplementary groups, sorted, with `gid`.
    pub groups: Vec<u32>,
    /// The user's name, or its number if passwd has no entry for it.
    pub name: String,
    pub home: String,
    /// The login shell, which may be empty.
    pub shell: String,
}

impl Account {
    /// Returns the account as a line of passwd(5), without characters that would end a field.
    pub(crate) fn to_passwd(&self) -> String {
        let clean = |text: &str| text.replace([':', '\n', '\r'], "_");
        let (name, home) = (clean(&self.name), clean(&self.home));
        format!("{name}:x:{}:{}::{home}:", self.uid, self.gid)
    }
}

/// An entry of passwd(5).
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
    shell: String,
}

/// Finds the account for `USER[:GROUP]`, where both are names or numbers. An empty user is root. A
/// number that passwd does not have is a user without a home directory in group 0. If a group is
/// named, it is the user's only group. These are the rules of Docker.
pub(crate) fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<Account, String> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (wanted, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = number(user);
    let entry = users(passwd).find(|u| u.name == user);
    let entry = entry.or_else(|| users(passwd).find(|u| Some(u.uid) == number));
    let entry = match (entry, number) {
        (Some(entry), _) => entry,
        (None, Some(uid)) => User {
            name: if uid == 0 { "root" } else { user }.to_owned(),
            uid,
            gid: 0,
            home: String::new(),
            shell: String::new(),
        },
        (None, None) => return Err(format!("the image has no user {user:?}")),
    };
    let (gid, mut groups) = match wanted_group {
        Some(wanted) => {
            let gid = group_id(wanted, group)
                .ok_or_else(|| format!("the image has no group {wanted:?}"))?;
            (gid, Vec::new())
        }
        None => (entry.gid, memberships(&entry.name, group)),
    };
    groups.push(gid);
    groups.sort_unstable();
    groups.dedup();
    groups.truncate(GROUPS_MAX);
    let home = if entry.home.is_empty() {
        "/".to_owned()
    } else {
        entry.home
    };
    Ok(Account {
        uid: entry.uid,
        gid,
        groups,
        name: entry.name,
        home,
        shell: entry.shell,
    })
}

/// The kernel's limit of supplementary groups (NGROUPS_MAX of limits.h).
const GROUPS_MAX: usize = 65_536;

/// Parses a user or group number. The largest one means "no change" to setuid(2).
fn number(text: &str) -> Option<u32> {
    let all_digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|n| all_digits && *n != u32::MAX)
}

fn users(passwd: &str) -> impl Iterator<Item = User> {
    passwd.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, rest @ ..] = fields.as_slice() else {
            return None;
        };
        Some(User {
            name: (*name).to_owned(),
            uid: number(uid)?,
            gid: number(gid)?,
            home: (*home).to_owned(),
            shell: rest.first().copied().unwrap_or_default().to_owned(),
        })
        .filter(|user| !user.name.is_empty())
    })
}

/// An entry of group(5).
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?)?;
        Some(Group {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

fn group_id(wanted: &str, group: &str) -> Option<u32> {
    let by_name = groups(group).find(|g| g.name == wanted);
    by_name.map(|g| g.gid).or_else(|| number(wanted))
}

fn memberships(user: &str, group: &str) -> Vec<u32> {
    groups(group)
        .filter(|g| g.members.split(',').any(|member| member == user))
        .map(|g| g.gid)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n# comment\nbroken:x:1\nbad:x:-1:0::/:\n\
        dev:x:1000:1000:Dev,,,:/home/dev:/bin/sh\n7:x:70:71::/seven\nlast:x:4294967295:1::/:/bin/sh\nbare:x:5:6::";
    const GROUP: &str = "root:x:0:\nbroken\nsudo:x:27:ann,dev\ndev:x:1000:\nwheel:x:10:dev\nodd:x:1x:dev\nvideo:x:44:devil";

    #[track_caller]
    fn check(wanted: &str, uid: u32, gid: u32, groups: &[u32], home: &str) {
        let found = resolve(wanted, PASSWD, GROUP).unwrap();
        assert_eq!(
            (found.uid, found.gid, &*found.groups, &*found.home),
            (uid, gid, groups, home)
        );
    }

    #[test]
    fn account_is_found_by_name_and_by_number() {
        check("", 0, 0, &[0], "/root");
        check("root", 0, 0, &[0], "/root");
        check("dev", 1000, 1000, &[10, 27, 1000], "/home/dev");
        check("1000", 1000, 1000, &[10, 27, 1000], "/home/dev");
        check("dev:video", 1000, 44, &[44], "/home/dev");
        check("dev:5", 1000, 5, &[5], "/home/dev");
        check("dev:", 1000, 1000, &[10, 27, 1000], "/home/dev");
        check(":27", 0, 27, &[27], "/root");
        // A name takes precedence over a number.
        check("7", 70, 71, &[71], "/seven");
        check("bare", 5, 6, &[6], "/");
    }

    #[test]
    fn number_without_an_entry_needs_no_files() {
        let found = resolve("65532", "", "").unwrap();
        assert_eq!(
            (found.uid, found.gid, &*found.home, &*found.name),
            (65532, 0, "/", "65532")
        );
        assert_eq!(found.to_passwd(), "65532:x:65532:0::/:");
        assert_eq!(
            resolve("0:0", "", "").unwrap().to_passwd(),
            "root:x:0:0::/:"
        );
    }

    #[test]
    fn unknown_name_is_refused() {
        for bad in [
            "ann",
            "-1",
            "+5",
            "4294967295",
            "4294967296",
            "bad",
            "last",
            "broken",
            "1 ",
        ] {
            assert!(resolve(bad, PASSWD, GROUP).is_err(), "{bad}");
        }
        assert!(resolve("dev:nobody", PASSWD, GROUP).is_err());
        assert!(resolve("dev:odd", PASSWD, GROUP).is_err());
    }
}
