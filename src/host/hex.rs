//! Writes bytes as lower-case hexadecimal digits.

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Encodes each byte as two digits.
pub fn encode(bytes: &[u8]) -> String {
    let digits = |b: &u8| [b >> 4, b & 15].map(|digit| DIGITS[usize::from(digit)] as char);
    bytes.iter().flat_map(digits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encode_matches_formatting_of_each_byte() {
        let all: Vec<u8> = (0..=255).collect();
        let formatted: String = all.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(encode(&all), formatted);
        assert_eq!(encode(&[]), "");
    }
}
