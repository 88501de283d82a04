package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/server/wire"
)

// noun is a command that only holds others.
func (a *app) noun(use, short string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, GroupID: groupManage, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(verbs...)
	return cmd
}

// verb makes a command of an action.
func (a *app) verb(use, short, long, example string, args cobra.PositionalArgs, flags func(*pflag.FlagSet), do func(ctx context.Context, cl *client.Client, args []string) error) *cobra.Command {
	var c connection
	cmd := &cobra.Command{Use: use, Short: short, Long: long, Example: examples(example), Args: args, RunE: a.withClient(&c, do)}
	c.register(cmd)
	if flags != nil {
		flags(cmd.Flags())
	}
	return cmd
}

// settingFlags are flags that change settings: those that were given, by the names of JSON.
type settingFlags struct {
	flags *pflag.FlagSet
	list  []struct {
		flag, name string
		value      func() any
	}
}

func (s *settingFlags) add(flag, name string, value func() any) {
	s.list = append(s.list, struct {
		flag, name string
		value      func() any
	}{flag, name, value})
}

func (s *settingFlags) seconds(flag, name, usage string) {
	v := s.flags.Duration(flag, 0, usage)
	s.add(flag, name, func() any { return *v })
}

func (s *settingFlags) number(flag, name, usage string) {
	v := s.flags.Uint64(flag, 0, usage)
	s.add(flag, name, func() any { return *v })
}

func (s *settingFlags) bool(flag, name, usage string) {
	v := s.flags.Bool(flag, false, usage)
	s.add(flag, name, func() any { return *v })
}

func (s *settingFlags) text(flag, name, usage string) {
	v := s.flags.String(flag, "", usage)
	s.add(flag, name, func() any { return *v })
}

// given returns the settings whose flags were given.
func (s *settingFlags) given() (client.Settings, error) {
	out := client.Settings{}
	for _, f := range s.list {
		if !s.flags.Changed(f.flag) {
			continue
		}
		value := f.value()
		if d, ok := value.(time.Duration); ok {
			if err := wholeSeconds("--"+f.flag, d); err != nil {
				return nil, err
			}
			value = int64(d / time.Second)
		}
		out[f.name] = value
	}
	return out, nil
}

func (s *settingFlags) topic(f *pflag.FlagSet) {
	s.flags = f
	s.seconds("retention", "retentionDefaultSeconds", "how long messages live that do not say (0: a day)")
	s.seconds("retention-max", "retentionMaxSeconds", "longest retention; longer ones are cut (0: 7 days)")
	s.number("message-bytes-max", "messageBytesMax", "largest message in `bytes` (0: the cluster's limit)")
	s.number("depth-max", "depthMax", "most `messages` the topic may hold (0: any number)")
	s.bool("drop-acknowledged", "dropAcknowledged", "remove a message once every group has acknowledged it, instead of when it expires")
}

func (s *settingFlags) group(f *pflag.FlagSet) {
	s.flags = f
	s.number("max-deliveries", "maxDeliveries", "`number` of deliveries after which a message is given up (0: never)")
	s.bool("park", "park", "park what is given up, instead of dropping it")
	s.seconds("parked-retention", "parkedRetentionSeconds", "how long parked messages are kept at least")
	s.seconds("initial-delay", "initialDelaySeconds", "keep each message from the group until it is that old")
	s.number("max-concurrency", "maxConcurrency", "most `messages` under lease at a time (0: any number)")
	s.text("deployment", "deploymentId", "`deployment` of receives that name none")
}

func printTopics(w io.Writer, list []wire.Topic) error {
	rows := [][]string{{"TOPIC", "STORED", "DELAYED", "GROUPS", "OLDEST", "STATE"}}
	for _, t := range list {
		rows = append(rows, []string{printable(t.Name), strconv.FormatUint(t.NextOffset-t.FirstOffset, 10), strconv.FormatUint(t.Delayed, 10), strconv.Itoa(t.Groups), t.OldestAt, stateOf(t.Settings.Paused)})
	}
	return table(w, rows)
}

func stateOf(paused bool) string {
	if paused {
		return "paused"
	}
	return "active"
}

// printable shows a name that may hold anything; one that could confuse a terminal is quoted.
func printable(name string) string {
	if quoted := strconv.Quote(name); quoted != `"`+name+`"` || strings.Contains(name, " ") {
		return quoted
	}
	return name
}

func printGroups(w io.Writer, list []wire.Group) error {
	rows := [][]string{{"GROUP", "READY", "INFLIGHT", "RETURNED", "PARKED", "OLDEST", "STATE"}}
	for _, g := range list {
		rows = append(rows, []string{printable(g.Name), strconv.FormatUint(g.Ready, 10), strconv.Itoa(g.Inflight), strconv.Itoa(g.Returned), strconv.Itoa(g.Parked), g.OldestAt, stateOf(g.Settings.Paused)})
	}
	return table(w, rows)
}

// fields prints a document as names and values, in the order and by the names of its JSON.
func fields(w io.Writer, document any) error {
	data, err := json.Marshal(document)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.UseNumber()
	var rows [][]string
	var read func(prefix string) error
	read = func(prefix string) error {
		if _, err := dec.Token(); err != nil {
			return err
		}
		for dec.More() {
			name, err := dec.Token()
			if err != nil {
				return err
			}
			key := prefix + fmt.Sprint(name)
			var raw json.RawMessage
			if err := dec.Decode(&raw); err != nil {
				return err
			}
			if raw[0] == '{' {
				outer := dec
				dec = json.NewDecoder(strings.NewReader(string(raw)))
				err := read(key + ".")
				dec = outer
				if err != nil {
					return err
				}
				continue
			}
			text := string(raw)
			var s string
			if json.Unmarshal(raw, &s) == nil {
				text = printable(s)
			}
			rows = append(rows, []string{key, text})
		}
		_, err := dec.Token()
		return err
	}
	if err := read(""); err != nil {
		return err
	}
	return table(w, rows)
}

func (a *app) printTopic(t wire.Topic) error {
	return a.print(t, func(w io.Writer) error { return fields(w, t) })
}

func (a *app) printGroup(g wire.Group) error {
	return a.print(g, func(w io.Writer) error { return fields(w, g) })
}

func (a *app) topicCommand() *cobra.Command {
	var create, change settingFlags
	var yes string
	confirm := func(f *pflag.FlagSet) {
		f.StringVar(&yes, "confirm", "", "the topic's `name` again: this cannot be undone")
	}
	pause := func(use, short string, paused bool) *cobra.Command {
		return a.verb(use+" TOPIC", short, "", fmt.Sprintf(`
			tercet topic %[1]s orders
			tercet topic %[1]s orders --server http://127.0.0.1:7301
			tercet topic %[1]s orders -o json`, use), cobra.ExactArgs(1), nil,
			func(ctx context.Context, cl *client.Client, args []string) error {
				t, err := cl.ChangeTopic(ctx, args[0], client.Settings{"paused": paused})
				if err != nil {
					return err
				}
				return a.printTopic(t)
			})
	}
	return a.noun("topic", "Look at topics and change them",
		a.verb("list", "List topics", "", `
			tercet topic list
			tercet topic list --server http://127.0.0.1:7302
			tercet topic list -o json | jq -r .name`, cobra.NoArgs, nil,
			func(ctx context.Context, cl *client.Client, _ []string) error {
				var all []wire.Topic
				for after := ""; ; {
					page, err := cl.Topics(ctx, after, 1000)
					if err != nil {
						return err
					}
					all = append(all, page.Topics...)
					if after = page.Next; after == "" {
						break
					}
				}
				return printEach(a, all, printTopics)
			}),
		a.verb("show TOPIC", "Show a topic and its settings", "", `
			tercet topic show orders
			tercet topic show orders --server http://127.0.0.1:7302
			tercet topic show orders -o json | jq .settings`, cobra.ExactArgs(1), nil,
			func(ctx context.Context, cl *client.Client, args []string) error {
				t, err := cl.Topic(ctx, args[0])
				if err != nil {
					return err
				}
				return a.printTopic(t)
			}),
		a.verb("create TOPIC", "Make a topic, with settings", "A topic needs no making: it exists once something is published to it. This sets what it is to be like.", `
			tercet topic create orders
			tercet topic create orders --retention 72h --depth-max 1000000
			tercet topic create orders --message-bytes-max 65536 -o json`, cobra.ExactArgs(1), create.topic,
			func(ctx context.Context, cl *client.Client, args []string) error {
				settings, err := create.given()
				if err != nil {
					return err
				}
				t, err := cl.CreateTopic(ctx, args[0], settings)
				if err != nil {
					return err
				}
				return a.printTopic(t)
			}),
		a.verb("set TOPIC", "Change a topic's settings", "Settings that are not named stay as they are; 0 leaves the cluster's limit in force.", `
			tercet topic set orders --retention 72h
			tercet topic set orders --depth-max 0
			tercet topic set orders --message-bytes-max 65536 -o json`, cobra.ExactArgs(1), change.topic,
			func(ctx context.Context, cl *client.Client, args []string) error {
				settings, err := change.given()
				if err != nil {
					return err
				}
				if len(settings) == 0 {
					return usageError{errors.New("nothing to set: name a setting")}
				}
				t, err := cl.ChangeTopic(ctx, args[0], settings)
				if err != nil {
					return err
				}
				return a.printTopic(t)
			}),
		pause("pause", "Stop all deliveries of a topic; publishes go on", true),
		pause("resume", "Let deliveries of a topic go on", false),
		a.verb("purge TOPIC", "Drop every message of a topic", "Drops everything that is stored, delayed messages included, for all groups. Groups and settings stay. It cannot be undone;\n`tercet topic pause` can.", `
			tercet topic purge orders --confirm orders
			tercet topic purge orders --confirm orders --server http://127.0.0.1:7301
			tercet topic purge orders --confirm orders -o json`, cobra.ExactArgs(1), confirm,
			func(ctx context.Context, cl *client.Client, args []string) error {
				if err := confirmed(args[0], yes); err != nil {
					return err
				}
				t, err := cl.PurgeTopic(ctx, args[0])
				if err != nil {
					return err
				}
				return a.printTopic(t)
			}),
		a.verb("delete TOPIC", "Delete a topic with its groups and messages", "A topic of that name that appears later is another one: receipts and message ids of the old one end in 404.", `
			tercet topic delete orders --confirm orders
			tercet topic delete orders --confirm orders --server http://127.0.0.1:7301
			tercet topic delete old --confirm old --timeout 5s`, cobra.ExactArgs(1), confirm,
			func(ctx context.Context, cl *client.Client, args []string) error {
				if err := confirmed(args[0], yes); err != nil {
					return err
				}
				return cl.DeleteTopic(ctx, args[0])
			}),
	)
}

// printEach prints a list: as lines of JSON, one value each, or as a table.
func printEach[T any](a *app, list []T, rows func(io.Writer, []T) error) error {
	if a.output != outputJSON {
		return rows(a.out, list)
	}
	for i := range list {
		if err := a.print(list[i], nil); err != nil {
			return err
		}
	}
	return nil
}

// confirmed checks that whoever destroys something has said its name twice.
func confirmed(name, again string) error {
	if name != again {
		return usageError{fmt.Errorf("this cannot be undone: repeat the name with --confirm %s", printable(name))}
	}
	return nil
}

// startFlags are the flags of a place in a topic.
type startFlags struct{ at, time, id string }

func (s *startFlags) register(f *pflag.FlagSet) {
	f.StringVar(&s.at, "at", "", "`place`: beginning or end (default: the beginning)")
	f.StringVar(&s.time, "time", "", "at the first message published at this `time` or later (2026-11-22T06:00:00Z, or 2h for two hours ago)")
	f.StringVar(&s.id, "id", "", "behind this stream `ID`")
}

func (s *startFlags) start(must bool) (out wire.Start, err error) {
	n := 0
	for _, v := range []string{s.at, s.time, s.id} {
		if v != "" {
			n++
		}
	}
	switch {
	case n > 1:
		return out, usageError{errors.New("--at, --time and --id exclude each other")}
	case n == 0 && must:
		return out, usageError{errors.New("say where to: --at, --time or --id")}
	case s.time != "":
		t, err := moment("--time", s.time)
		return wire.Start{At: "time", Time: t.UTC().Format(time.RFC3339Nano)}, err
	case s.id != "":
		return wire.Start{At: "id", ID: s.id}, nil
	case s.at != "" && s.at != "beginning" && s.at != "end":
		return out, usageError{fmt.Errorf("--at %s: want beginning or end", s.at)}
	}
	return wire.Start{At: s.at}, nil
}

// moment reads a time, or how long ago it was.
func moment(flag, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return time.Now().Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return t, usageError{fmt.Errorf("%s %s: want a time such as 2026-11-22T06:00:00Z, or how long ago such as 2h", flag, text)}
	}
	return t, nil
}

func (a *app) groupCommand() *cobra.Command {
	var create, change settingFlags
	var begin, to startFlags
	var yes string
	pause := func(use, short string, paused bool) *cobra.Command {
		return a.verb(use+" TOPIC GROUP", short, "", fmt.Sprintf(`
			tercet group %[1]s orders billing
			tercet group %[1]s orders billing --server http://127.0.0.1:7301
			tercet group %[1]s orders billing -o json`, use), cobra.ExactArgs(2), nil,
			func(ctx context.Context, cl *client.Client, args []string) error {
				g, err := cl.ChangeGroup(ctx, args[0], args[1], client.Settings{"paused": paused})
				if err != nil {
					return err
				}
				return a.printGroup(g)
			})
	}
	return a.noun("group", "Look at consumer groups and change them",
		a.verb("list TOPIC", "List a topic's groups", "", `
			tercet group list orders
			tercet group list orders --server http://127.0.0.1:7302
			tercet group list orders -o json | jq -r .name`, cobra.ExactArgs(1), nil,
			func(ctx context.Context, cl *client.Client, args []string) error {
				var all []wire.Group
				for after := ""; ; {
					page, err := cl.Groups(ctx, args[0], after, 1000)
					if err != nil {
						return err
					}
					all = append(all, page.Groups...)
					if after = page.Next; after == "" {
						break
					}
				}
				return printEach(a, all, printGroups)
			}),
		a.verb("show TOPIC GROUP", "Show a group: depth, rates, when it is done, what will expire unreached", "The node compares two looks at the group; who asks for the first time waits half a second for the second one.", `
			tercet group show orders billing
			tercet group show orders billing --server http://127.0.0.1:7302
			tercet group show orders billing -o json | jq .rates`, cobra.ExactArgs(2), nil,
			func(ctx context.Context, cl *client.Client, args []string) error {
				g, err := cl.GroupRates(ctx, args[0], args[1])
				if err != nil {
					return err
				}
				return a.printGroup(g)
			}),
		a.verb("create TOPIC GROUP", "Make a group, at a place and with settings", "A group needs no making: it exists once something is received with it, at the beginning of its topic. A group that exists is not\nmoved by this.", `
			tercet group create orders billing
			tercet group create orders billing --at end
			tercet group create orders billing --time 2h --max-deliveries 5 --park`, cobra.ExactArgs(2), func(f *pflag.FlagSet) { create.group(f); begin.register(f) },
			func(ctx context.Context, cl *client.Client, args []string) error {
				settings, err := create.given()
				if err != nil {
					return err
				}
				at, err := begin.start(false)
				if err != nil {
					return err
				}
				g, err := cl.CreateGroup(ctx, args[0], args[1], at, settings)
				if err != nil {
					return err
				}
				return a.printGroup(g)
			}),
		a.verb("set TOPIC GROUP", "Change a group's settings", "Settings that are not named stay as they are.", `
			tercet group set orders billing --max-deliveries 5 --park
			tercet group set orders billing --max-concurrency 0
			tercet group set orders billing --park=false -o json`, cobra.ExactArgs(2), change.group,
			func(ctx context.Context, cl *client.Client, args []string) error {
				settings, err := change.given()
				if err != nil {
					return err
				}
				if len(settings) == 0 {
					return usageError{errors.New("nothing to set: name a setting")}
				}
				g, err := cl.ChangeGroup(ctx, args[0], args[1], settings)
				if err != nil {
					return err
				}
				return a.printGroup(g)
			}),
		pause("pause", "Stop deliveries to a group; leases can still be settled", true),
		pause("resume", "Let deliveries to a group go on", false),
		a.verb("seek TOPIC GROUP", "Move a group to another place in its topic", "All its leases end, and everything from there on is delivered anew. Parked messages stay parked.", `
			tercet group seek orders billing --at beginning
			tercet group seek orders billing --time 2h
			tercet group seek orders billing --time 2026-11-22T06:00:00Z -o json`, cobra.ExactArgs(2), to.register,
			func(ctx context.Context, cl *client.Client, args []string) error {
				at, err := to.start(true)
				if err != nil {
					return err
				}
				g, err := cl.SeekGroup(ctx, args[0], args[1], at)
				if err != nil {
					return err
				}
				return a.printGroup(g)
			}),
		a.verb("delete TOPIC GROUP", "Delete a group with its leases and parked messages", "", `
			tercet group delete orders billing --confirm billing
			tercet group delete orders billing --confirm billing --server http://127.0.0.1:7301
			tercet group delete orders old --confirm old --timeout 5s`, cobra.ExactArgs(2), func(f *pflag.FlagSet) {
			f.StringVar(&yes, "confirm", "", "the group's `name` again: this cannot be undone")
		},
			func(ctx context.Context, cl *client.Client, args []string) error {
				if err := confirmed(args[1], yes); err != nil {
					return err
				}
				return cl.DeleteGroup(ctx, args[0], args[1])
			}),
	)
}
