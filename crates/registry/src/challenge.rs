//! `WWW-Authenticate`: what a registry wants to see before it answers.

/// One challenge of RFC 9110: a scheme and its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token from a token service.
    Bearer(TokenService),
    /// A scheme that is not known here.
    Other(String),
}

/// Where to get a token, and for what.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenService {
    pub(crate) realm: String,
    pub(crate) service: Option<String>,
    pub(crate) scope: Option<String>,
}

/// Reads one header, which may hold several challenges. What is malformed ends the reading; what
/// came before it stands.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = Cursor(header);
    while let Some((scheme, parameters)) = rest.challenge() {
        challenges.push(Challenge::new(scheme, &parameters));
    }
    challenges
}

/// The challenge that is answered: Bearer before Basic, since it does not send the password around.
pub(crate) fn choose<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
    let rank = |challenge: &Challenge| match challenge {
        Challenge::Bearer(_) => 0,
        Challenge::Basic => 1,
        Challenge::Other(_) => 2,
    };
    headers.into_iter().take(MAX_HEADERS).flat_map(parse).min_by_key(rank)
}

impl Challenge {
    fn new(scheme: &str, parameters: &[(String, String)]) -> Self {
        let parameter = |name: &str| {
            let mut found = parameters.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
            found.next().map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
        };
        if scheme.eq_ignore_ascii_case("basic") {
            return Self::Basic;
        }
        match parameter("realm") {
            Some(realm) if scheme.eq_ignore_ascii_case("bearer") => Self::Bearer(TokenService {
                realm,
                service: parameter("service"),
                scope: parameter("scope"),
            }),
            _ => Self::Other(scheme.to_owned()),
        }
    }
}

struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn skip(&mut self, chars: &[char]) {
        self.0 = self.0.trim_start_matches(chars);
    }

    fn token(&mut self) -> Option<&'a str> {
        let is_token_char =
            |char: char| char.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(char);
        let end = self.0.find(|char| !is_token_char(char)).unwrap_or(self.0.len());
        let (token, rest) = self.0.split_at(end);
        self.0 = rest;
        (!token.is_empty()).then_some(token)
    }

    fn quoted(&mut self) -> Option<String> {
        let mut value = String::new();
        let mut chars = self.0.strip_prefix('"')?.char_indices();
        while let Some((at, char)) = chars.next() {
            match char {
                '"' => {
                    self.0 = &self.0[at + 2..];
                    return Some(value);
                }
                '\\' => value.push(chars.next()?.1),
                plain => value.push(plain),
            }
        }
        None
    }

    /// A scheme and all parameters up to the next scheme.
    fn challenge(&mut self) -> Option<(&'a str, Vec<(String, String)>)> {
        self.skip(&[' ', '\t', ',']);
        let scheme = self.token()?;
        let mut parameters = Vec::new();
        while parameters.len() < MAX_PARAMETERS {
            let before = self.0;
            self.skip(&[' ', '\t', ',']);
            match self.parameter() {
                Some(parameter) => parameters.push(parameter),
                None => {
                    // Not a parameter: the next challenge, or a token68 that is of no use here.
                    self.0 = before;
                    self.skip_token68();
                    break;
                }
            }
        }
        Some((scheme, parameters))
    }

    fn parameter(&mut self) -> Option<(String, String)> {
        let name = self.token()?;
        self.skip(&[' ', '\t']);
        self.0 = self.0.strip_prefix('=')?;
        self.skip(&[' ', '\t']);
        let value = match self.0.starts_with('"') {
            true => self.quoted()?,
            // Docker's own parser takes an unquoted URL as well.
            false => {
                let end = self.0.find([',', ' ', '\t']).unwrap_or(self.0.len());
                let (value, rest) = self.0.split_at(end);
                self.0 = rest;
                value.to_owned()
            }
        };
        Some((name.to_owned(), value))
    }

    fn skip_token68(&mut self) {
        let end = self.0.find(',').unwrap_or(self.0.len());
        if self.0[..end].trim_end().ends_with('=') {
            self.0 = &self.0[end..];
        }
    }
}

const MAX_HEADERS: usize = 8;
const MAX_PARAMETERS: usize = 16;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: &str, scope: &str) -> Challenge {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Challenge::Bearer(TokenService {
            realm: realm.to_owned(),
            service: some(service),
            scope: some(scope),
        })
    }

    #[track_caller]
    fn check(header: &str, expected: &[Challenge]) {
        assert_eq!(parse(header), expected, "{header}");
    }

    #[test]
    fn challenges_of_known_registries_are_read() {
        check(
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull,push""#,
            &[bearer(
                "https://auth.docker.io/token",
                "registry.docker.io",
                "repository:library/alpine:pull,push",
            )],
        );
        check(
            r#"Basic realm="https://1.dkr.ecr.us-east-1.amazonaws.com/",service="ecr.amazonaws.com""#,
            &[Challenge::Basic],
        );
        check(
            r#"bearer  Realm = "https://a/t" , SERVICE=plain"#,
            &[bearer("https://a/t", "plain", "")],
        );
        check("Bearer realm=https://a/t?x=1,service=s", &[bearer("https://a/t?x=1", "s", "")]);
        check(
            r#"Bearer realm="https://a/\"q\\",error="invalid_token""#,
            &[bearer("https://a/\"q\\", "", "")],
        );
        check("Basic", &[Challenge::Basic]);
    }

    #[test]
    fn several_challenges_in_one_header_are_told_apart() {
        check(
            r#"Negotiate, Basic realm="r", Bearer realm="https://a",scope="x""#,
            &[
                Challenge::Other("Negotiate".to_owned()),
                Challenge::Basic,
                bearer("https://a", "", "x"),
            ],
        );
        check(
            r#"Negotiate YWJj==, Bearer realm="https://a""#,
            &[Challenge::Other("Negotiate".to_owned()), bearer("https://a", "", "")],
        );
        let chosen = choose([r#"Basic realm="r""#, r#"Bearer realm="https://a""#]);
        assert_eq!(chosen, Some(bearer("https://a", "", "")));
        assert_eq!(choose(["Digest realm=x", "Basic"]), Some(Challenge::Basic));
        assert_eq!(choose([]), None);
    }

    #[test]
    fn malformed_challenges_end_the_reading() {
        check("", &[]);
        check("=", &[]);
        check(
            r#"Bearer realm="https://a"#,
            &[Challenge::Other("Bearer".to_owned()), Challenge::Other("realm".to_owned())],
        );
        check("Bearer service=s", &[Challenge::Other("Bearer".to_owned())]);
        check(r#"Bearer realm="""#, &[Challenge::Other("Bearer".to_owned())]);
    }

    proptest! {
        #[test]
        fn no_header_panics_or_grows(header in "\\PC{0,80}|[BbearicRlm=\", \\\\é]{0,80}") {
            prop_assert!(parse(&header).len() <= header.len());
        }
    }
}
