#!/usr/bin/perl
# Checks the tables of mutants, tests/mutants/*.txt, against the sources. With a directory, also
# writes a copy of the repository there that has every mutant built in, and prints one line for each
# mutant: its name, the test binary and the test that must catch it, separated by tabs. In the copy,
# the variable FCD_MUTANT names the mutant that is switched on.
# usage: weave.pl [DIRECTORY]    (in the root of the repository)
#
# A table has one paragraph for each mutant:
#
#   mutant     what goes wrong
#   file       src/ops/mod.rs
#   caught by  lib ops::tests::the_test        (or "it the::test", in tests/it)
#   - an original line
#   + the line that replaces it; MUTANT is true while this mutant is on
#
# Consecutive - lines must occur exactly once in the file, whatever their indentation. A mutant may
# have several pairs of - and + lines, and several file lines, and may edit the + lines of a mutant
# before it. "equivalent WHY" instead of "caught by" says why no test can catch the mutant, which is
# built but not run.
use strict;
use warnings;
use File::Basename;
use File::Path 'make_path';

my $into = shift;
my (%lines, %woven, %names, @mutants);
my $failures = 0;

sub complain { print STDERR "mutants: @_\n"; $failures++ }

sub slurp {
    my ($path) = @_;
    open my $in, '<', $path or die "read $path: $!\n";
    local $/;
    return scalar <$in>;
}

sub trimmed { my ($s) = @_; $s =~ s/^\s+|\s+$//g; return $s }

# Replaces the lines @$old by @$new in the file, and keeps the indentation of the first.
sub replace {
    my ($where, $path, $old, $new) = @_;
    return complain("$where: $path does not exist") unless -f $path;
    my $text = $lines{$path} //= [split /\n/, slurp($path), -1];
    my @wanted = map { trimmed($_) } @$old;
    my @found = grep {
        my $at = $_;
        !grep { trimmed($text->[$at + $_] // '') ne $wanted[$_] } 0 .. $#wanted;
    } 0 .. $#$text;
    if (@found != 1) {
        return complain("$where: found ".@found." times in $path:\n    ".join("\n    ", @wanted));
    }
    my ($indent) = $text->[$found[0]] =~ /^(\s*)/;
    splice @$text, $found[0], scalar @wanted, map { "$indent$_" } @$new;
    $woven{$path} = 1;
}

sub has_test {
    my ($binary, $test) = @_;
    my ($function) = $test =~ /(\w+)$/;
    our %sources;
    my $dir = $binary eq 'lib' ? 'src' : "tests/$binary";
    $sources{$dir} //= join '', map { chomp; slurp($_) } `find $dir -name '*.rs'`;
    return $sources{$dir} =~ /\bfn \Q$function\E\(/;
}

for my $table (sort glob 'tests/mutants/*.txt') {
    for my $paragraph (split /\n\s*\n/, slurp($table)) {
        my (%m, @hunks, $file);
        for my $line (split /\n/, $paragraph) {
            next if $line =~ /^(#.*)?$/;
            if ($line =~ /^mutant\s+(.+)$/) { $m{name} = $1 }
            elsif ($line =~ /^file\s+(\S+)$/) { $file = $1; push @hunks, { file => $1 } }
            elsif ($line =~ /^caught by\s+(lib|it)\s+(\S+)$/) { @m{qw(binary test)} = ($1, $2) }
            elsif ($line =~ /^equivalent\s+(.+)$/) { $m{equivalent} = $1 }
            elsif ($line =~ /^([-+]) ?(.*)$/) {
                push @hunks, { file => $file } if $1 eq '-' && $hunks[-1]{'+'};
                push @{ $hunks[-1]{$1} }, $2;
            }
            else { complain("$table: cannot read: $line") }
        }
        next unless %m || @hunks;
        my $where = "$table: ".($m{name} // 'a mutant without a name');
        complain("$where: two mutants have this name") if $names{ $m{name} // '' }++;
        my $switch = 'crate::mutant("'.($m{name} // '').'")';
        for my $hunk (grep { $_->{'-'} || $_->{'+'} } @hunks) {
            my @new = @{ $hunk->{'+'} // [] }; # A copy, which is edited.
            complain("$where: no original") unless $hunk->{'-'};
            s/\bMUTANT\b/$switch/g for @new;
            replace($where, $hunk->{file}, $hunk->{'-'} // [], \@new);
        }
        complain("$where: no switch") unless grep { /\bMUTANT\b/ } map { @{ $_->{'+'} // [] } } @hunks;
        next if $m{equivalent};
        if (!$m{test}) { complain("$where: no test catches it") }
        elsif (!has_test($m{binary}, $m{test})) { complain("$where: no test $m{test}") }
        push @mutants, \%m;
    }
}
exit 1 if $failures;

# Writes every file of the repository, except those that have the right content already, so that
# cargo builds only what has changed.
sub write_tree {
    my ($into) = @_;
    for my $path (split /\0/, `git ls-files -z -co --exclude-standard`) {
        next unless -f $path;
        my $text = $woven{$path} ? join "\n", @{ $lines{$path} } : slurp($path);
        $text .= <<'RUST' if $path eq 'src/lib.rs';

/// True while this mutant is switched on.
#[allow(dead_code, clippy::disallowed_methods)]
pub(crate) fn mutant(name: &str) -> bool {
    static ON: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    ON.get_or_init(|| std::env::var("FCD_MUTANT").ok()).as_deref() == Some(name)
}
RUST
        next if -f "$into/$path" && slurp("$into/$path") eq $text;
        make_path(dirname("$into/$path"));
        open my $out, '>', "$into/$path" or die "write $into/$path: $!\n";
        print $out $text;
        close $out or die "write $into/$path: $!\n";
        chmod((stat $path)[2] & 0777, "$into/$path");
    }
}

if (defined $into) {
    write_tree($into);
    print join("\t", @$_{qw(name binary test)}), "\n" for @mutants;
}
else {
    print scalar @mutants, " mutants in ", scalar keys %woven, " files\n";
}
