//! Which images are meant, in the kubelet's way: `matchImages` of a plugin, and the keys of its answers.

/// Whether `pattern` means `image`, which is a registry and a path: hosts have the same number of labels,
/// each as the shell would match it, the ports are the same, and the path begins with the pattern's.
pub(super) fn matches(pattern: &str, image: &str) -> bool {
    let ((pattern_host, pattern_path), (host, path)) = (split(pattern), split(image));
    let ((pattern_host, pattern_port), (host, port)) = (port_of(pattern_host), port_of(host));
    let (pattern_labels, labels) = (pattern_host.split('.'), host.split('.'));
    pattern_port == port
        && path.starts_with(pattern_path)
        && pattern_labels.clone().count() == labels.clone().count()
        && pattern_labels.zip(labels).all(|(pattern, label)| label_matches(pattern, label))
}

/// The registry, and the rest from its slash on.
fn split(image: &str) -> (&str, &str) {
    image.split_at(image.find('/').unwrap_or(image.len()))
}

fn port_of(host: &str) -> (&str, &str) {
    host.rsplit_once(':').unwrap_or((host, ""))
}

/// As Go's `path.Match`; a malformed pattern matches nothing.
fn label_matches(pattern: &str, label: &str) -> bool {
    let Some(pattern) = parse(pattern) else { return false };
    let label: Vec<char> = label.chars().collect();
    // Where to go on if the last `*` takes one character more.
    let (mut at, mut next, mut again) = (0, 0, None);
    loop {
        match (pattern.get(next), label.get(at)) {
            (None, None) => return true,
            (Some(Piece::Anything), _) => {
                next += 1;
                again = Some((next, at + 1));
                continue;
            }
            (Some(Piece::One(class)), Some(char)) if class.contains(*char) => {
                (next, at) = (next + 1, at + 1);
                continue;
            }
            _ => {}
        }
        match again {
            Some((piece, from)) if from <= label.len() => {
                (next, at, again) = (piece, from, Some((piece, from + 1)));
            }
            _ => return false,
        }
    }
}

enum Piece {
    Anything,
    One(Class),
}

struct Class {
    ranges: Vec<(char, char)>,
    is_negated: bool,
}

impl Class {
    fn only(char: char) -> Self {
        Self { ranges: vec![(char, char)], is_negated: false }
    }

    fn contains(&self, char: char) -> bool {
        self.ranges.iter().any(|(low, high)| (*low..=*high).contains(&char)) != self.is_negated
    }
}

fn parse(pattern: &str) -> Option<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut chars = pattern.chars().peekable();
    while let Some(char) = chars.next() {
        pieces.push(match char {
            '*' => Piece::Anything,
            '?' => Piece::One(Class { ranges: Vec::new(), is_negated: true }),
            '\\' => Piece::One(Class::only(chars.next()?)),
            '[' => {
                let is_negated = chars.next_if_eq(&'^').is_some();
                let mut ranges = Vec::new();
                while ranges.is_empty() || chars.next_if_eq(&']').is_none() {
                    let low = one(&mut chars)?;
                    let high = match chars.next_if_eq(&'-') {
                        Some(_) => one(&mut chars)?,
                        None => low,
                    };
                    ranges.push((low, high));
                }
                Piece::One(Class { ranges, is_negated })
            }
            char => Piece::One(Class::only(char)),
        });
    }
    Some(pieces)
}

/// A character within brackets.
fn one(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<char> {
    match chars.next()? {
        '-' | ']' => None,
        '\\' => chars.next(),
        char => Some(char),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_match_as_the_kubelet_says() {
        for (pattern, image, expected) in [
            ("r.io", "r.io/a/b", true),
            ("r.io/a", "r.io/a/b", true),
            // The kubelet compares paths as texts.
            ("r.io/a", "r.io/ab", true),
            ("r.io/b", "r.io/a", false),
            ("r.io:5000", "r.io:5000/a", true),
            ("r.io:5000", "r.io/a", false),
            ("r.io", "r.io:5000/a", false),
            ("*.r.io", "x.r.io/a", true),
            ("*.r.io", "r.io/a", false),
            ("*.r.io", "y.x.r.io/a", false),
            ("*.*.r.io", "y.x.r.io/a", true),
            ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com/a", true),
            ("*.dkr.ecr.*.amazonaws.com.cn", "1.dkr.ecr.eu-west-1.amazonaws.com/a", false),
            ("docker.io", "docker.io/library/a", true),
            ("127.0.0.1:5000", "127.0.0.1:5000/a", true),
            ("*", "localhost/a", true),
            ("", "r.io/a", false),
            ("r.io/*", "r.io/a", false),
        ] {
            assert_eq!(matches(pattern, image), expected, "{pattern} {image}");
        }
    }

    #[test]
    fn labels_match_as_in_go() {
        for (pattern, label, expected) in [
            ("abc", "abc", true),
            ("*", "", true),
            ("*", "abc", true),
            ("a*", "abc", true),
            ("a*c", "abbc", true),
            ("a*c", "abcd", false),
            ("*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("ab[b-d]", "abc", true),
            ("ab[^b-d]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("[\\]a]", "]", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "acb", false),
            ("[]a]", "]", false),
            ("[", "[", false),
            ("[a-", "a", false),
            ("a\\", "a", false),
        ] {
            assert_eq!(label_matches(pattern, label), expected, "{pattern} {label}");
        }
    }
}
