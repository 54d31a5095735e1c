//! Parses `WWW-Authenticate` (RFC 9110, section 11.6.1).

/// The size limit of all values of the header together.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// The maximum number of parameters of one challenge.
const PARAMETERS_MAX: usize = 32;

/// A registry's request for authentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    /// A token of the authorization service at `realm`.
    Bearer(Bearer),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bearer {
    pub(super) realm: String,
    pub(super) service: Option<String>,
}

/// Returns the challenge to answer: `Bearer` if there is one, else `Basic`. Other schemes and
/// malformed challenges are skipped.
pub(super) fn choose<'a>(values: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut bytes = 0;
    let mut chosen = None;
    for value in values {
        bytes += value.len();
        if bytes > HEADER_BYTES_MAX {
            break;
        }
        for challenge in parse(value) {
            match (&challenge, &chosen) {
                (Challenge::Bearer(_), None | Some(Challenge::Basic))
                | (Challenge::Basic, None) => chosen = Some(challenge),
                _ => {}
            }
        }
    }
    chosen
}

/// Parses one value of the header, which may have several challenges.
fn parse(value: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut rest = Scanner(value);
    let mut current: Option<Raw> = None;
    loop {
        rest.skip_separators();
        let Some(token) = rest.token() else {
            // A malformed rest ends the value, because it is unknown where the next challenge
            // begins.
            break;
        };
        rest.skip_spaces();
        match (rest.assigned_value(), &mut current) {
            (Assigned::Value(value), Some(raw)) => raw.set(token, value),
            (Assigned::Value(_), None) => break,
            // A token without a value is the next scheme.
            (Assigned::Nothing, _) => {
                found.extend(current.take().and_then(Raw::finish));
                current = Some(Raw::new(token));
            }
            (Assigned::Malformed, _) => break,
        }
    }
    found.extend(current.and_then(Raw::finish));
    found
}

/// A challenge that is being parsed.
struct Raw<'a> {
    scheme: &'a str,
    bearer: Bearer,
    parameters: usize,
}

impl<'a> Raw<'a> {
    fn new(scheme: &'a str) -> Self {
        Self {
            scheme,
            bearer: Bearer::default(),
            parameters: 0,
        }
    }

    fn set(&mut self, name: &str, value: String) {
        self.parameters += 1;
        if self.parameters > PARAMETERS_MAX {
            return;
        }
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        // If a parameter occurs several times, its first value is used.
        if is("realm") && self.bearer.realm.is_empty() {
            self.bearer.realm = value;
        } else if is("service") {
            self.bearer.service.get_or_insert(value);
        }
    }

    fn finish(self) -> Option<Challenge> {
        if self.scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        let is_bearer = self.scheme.eq_ignore_ascii_case("bearer") && !self.bearer.realm.is_empty();
        is_bearer.then_some(Challenge::Bearer(self.bearer))
    }
}

/// The part after a token.
enum Assigned {
    Nothing,
    Value(String),
    Malformed,
}

/// The rest of a value.
struct Scanner<'a>(&'a str);

impl<'a> Scanner<'a> {
    fn skip_spaces(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t']);
    }

    fn skip_separators(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t', ',']);
    }

    fn token(&mut self) -> Option<&'a str> {
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        let len = self.0.bytes().take_while(|b| is_token(*b)).count();
        let (token, rest) = self.0.split_at(len);
        self.0 = rest;
        (len > 0).then_some(token)
    }

    /// Reads `= VALUE`, where the value is a token or in quotes.
    fn assigned_value(&mut self) -> Assigned {
        let Some(rest) = self.0.strip_prefix('=') else {
            return Assigned::Nothing;
        };
        self.0 = rest;
        self.skip_spaces();
        let value = match self.0.strip_prefix('"') {
            Some(rest) => {
                self.0 = rest;
                self.quoted()
            }
            None => self.token().map(str::to_owned),
        };
        value.map_or(Assigned::Malformed, Assigned::Value)
    }

    /// Reads the rest of a text in quotes. A backslash quotes the next character.
    fn quoted(&mut self) -> Option<String> {
        let mut value = String::new();
        let mut chars = self.0.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.0 = &self.0[at + 1..];
                    return Some(value);
                }
                '\\' => value.push(chars.next()?.1),
                c => value.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
mod unit {
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(values: &[&str], expected: Expect) {
        let chosen = match choose(values.iter().copied()) {
            None => "nothing".to_owned(),
            Some(Challenge::Basic) => "Basic".to_owned(),
            Some(Challenge::Bearer(b)) => {
                format!("Bearer {} {:?}", b.realm, b.service)
            }
        };
        expected.assert_eq(&chosen);
    }

    #[test]
    fn challenges_of_real_registries() {
        check(
            &[
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/gcc:pull""#,
            ],
            expect![[r#"Bearer https://auth.docker.io/token Some("registry.docker.io")"#]],
        );
        check(&[r#"Basic realm="Registry Realm""#], expect!["Basic"]);
        check(&["BASIC"], expect!["Basic"]);
        check(
            &[
                r#"Bearer realm="https://a/t",service="a",scope="repository:a:pull,push",error="invalid_token""#,
            ],
            expect![[r#"Bearer https://a/t Some("a")"#]],
        );
    }

    #[test]
    fn bearer_is_preferred_wherever_it_is() {
        let bearer = r#"bearer Realm = "https://a/t""#;
        check(
            &["Basic realm=x", bearer],
            expect!["Bearer https://a/t None"],
        );
        check(
            &[bearer, "Basic realm=x"],
            expect!["Bearer https://a/t None"],
        );
        check(
            &[r#"Negotiate, Basic realm="x", Bearer realm="https://a/t", service=s"#],
            expect![[r#"Bearer https://a/t Some("s")"#]],
        );
    }

    #[test]
    fn quotes_hide_separators() {
        check(
            &[r#"Bearer realm="https://a/?x=\"y\", Basic realm=z",service="a\\b""#],
            expect![[r#"Bearer https://a/?x="y", Basic realm=z Some("a\\b")"#]],
        );
    }

    #[test]
    fn malformed_challenges_are_skipped() {
        for value in [
            "",
            ",",
            "=",
            "Bearer",
            "Bearer realm=",
            "Bearer realm=\"x",
            "Digest realm=x",
            "realm=x",
            "Bearer service=x",
            "\u{e9}",
            "Bearer realm=\"\\",
        ] {
            check(&[value], expect!["nothing"]);
        }
        check(&[&"Basic,".repeat(9000)], expect!["nothing"]);
        check(
            &["Bearer realm=a, realm=b, service=c, service=d"],
            expect![[r#"Bearer a Some("c")"#]],
        );
    }
}
