//! Modification times with 64-bit seconds and nanoseconds, and their forms in tar headers.

/// A modification time. The seconds count from the epoch and may be negative; the nanoseconds are
/// added to the seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mtime {
    pub seconds: i64,
    /// The nanoseconds within the second, less than 1,000,000,000.
    pub nanoseconds: u32,
}

const SECOND: u32 = 1_000_000_000;
/// The largest time that fits in eleven octal digits, in the year 2242.
const OCTAL_MAX: i64 = 0o77777777777;

impl Mtime {
    pub(super) fn of(stat: &rustix::fs::Stat) -> Self {
        Self {
            seconds: stat.st_mtime,
            nanoseconds: stat.st_mtime_nsec as u32,
        }
    }

    /// Returns the seconds, clamped to what a header's octal field can hold.
    pub(super) fn octal(self) -> u64 {
        self.seconds.clamp(0, OCTAL_MAX) as u64
    }

    /// True if the octal field holds the time exactly.
    pub(super) fn is_octal(self) -> bool {
        self.nanoseconds == 0 && (0..=OCTAL_MAX).contains(&self.seconds)
    }

    /// Formats the time as a decimal number, as in the `mtime` record of a POSIX tar.
    pub(super) fn decimal(self) -> String {
        let (seconds, nanoseconds) = (i128::from(self.seconds), i128::from(self.nanoseconds));
        let total = seconds * i128::from(SECOND) + nanoseconds;
        let (sign, total) = if total < 0 {
            ("-", -total)
        } else {
            ("", total)
        };
        let text = format!(
            "{sign}{}.{:09}",
            total / i128::from(SECOND),
            total % i128::from(SECOND)
        );
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }

    /// Parses a decimal number of seconds. Drops digits after the ninth decimal. Returns `None` for
    /// any other text and for seconds that do not fit into 64 bits.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (is_negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let all_digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) {
            return None;
        }
        let nanoseconds: String = fraction
            .chars()
            .chain("000000000".chars())
            .take(9)
            .collect();
        let total = i128::from(whole.parse::<u64>().ok()?) * i128::from(SECOND)
            + nanoseconds.parse::<i128>().ok()?;
        let total = if is_negative { -total } else { total };
        Some(Self {
            seconds: i64::try_from(total.div_euclid(i128::from(SECOND))).ok()?,
            nanoseconds: total.rem_euclid(i128::from(SECOND)) as u32,
        })
    }

    /// Returns the time for `futimens` and `utimensat`, as both access and modification time.
    pub(super) fn timestamps(self) -> rustix::fs::Timestamps {
        let time = rustix::fs::Timespec {
            tv_sec: self.seconds,
            tv_nsec: self.nanoseconds.into(),
        };
        rustix::fs::Timestamps {
            last_access: time,
            last_modification: time,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(seconds: i64, nanoseconds: u32, text: &str) {
        let time = Mtime {
            seconds,
            nanoseconds,
        };
        assert_eq!(time.decimal(), text);
        assert_eq!(Mtime::parse(text), Some(time));
    }

    #[test]
    fn mtime_of_any_age_round_trips_through_text() {
        check(0, 0, "0");
        check(1, 5, "1.000000005");
        check(1_700_000_000, 120_000_000, "1700000000.12");
        check(-1, 500_000_000, "-0.5");
        check(-2, 999_999_999, "-1.000000001");
        check(-315_619_200, 0, "-315619200");
        check(10_413_792_000, 999_999_999, "10413792000.999999999");
        check(i64::MIN, 0, "-9223372036854775808");
        check(i64::MAX, 999_999_999, "9223372036854775807.999999999");
    }

    #[test]
    fn parse_text_that_is_not_a_time_is_rejected() {
        for bad in [
            "",
            "-",
            ".5",
            "1e3",
            " 1",
            "1 ",
            "+1",
            "--1",
            "1.2.3",
            "0x1",
            "99999999999999999999",
            "-9223372036854775809",
        ] {
            assert_eq!(Mtime::parse(bad), None, "{bad:?}");
        }
        assert_eq!(
            Mtime::parse("1.0000000019"),
            Some(Mtime {
                seconds: 1,
                nanoseconds: 1
            })
        );
    }
}
