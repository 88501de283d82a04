-- Lists a group's dead letters, makes them deliverable again, or ends them. They are walked in the order of their parking.
-- ARGV: group, operation (list, redrive, drop), max, rank to begin at, dry run (1), part of the reason, since, until (ms, 0: no bound),
--       deployment, then the IDs that are meant, none for all: kind (p or d) and ID in one
-- Answer: {count, rank to go on at or 0, rows}; a row: {id, deliveries, time of parking, fields, reason}
local group, operation, max, rank = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local dry, part, since, till, deployment = ARGV[5] == '1', ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
local named = nil
for i = 10, #ARGV do
  named = named or {}
  local id = string.sub(ARGV[i], 2)
  if string.sub(ARGV[i], 1, 1) == 'd' then id = redis.call('HGET', placed, id) end
  if id then named[id] = true end
end
local count, rows, looked = 0, {}, 0
while count < max and looked < 5000 do
  local at = redis.call('ZRANGE', parked, rank, rank, 'WITHSCORES')
  local id, since_when = at[1], tonumber(at[2])
  if not id then
    rank = 0
    break
  end
  looked = looked + 1
  local h = load(id)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if not h or not entry or h.expires > 0 and h.expires <= now then
    forget(group, id) -- it has expired, and is nobody's any more
    redis.call('ZREM', parked, id)
    redis.call('HDEL', why, id)
  else
    local reason = string.match(redis.call('HGET', why, id) or '', '^%d+ %d+ (.*)$') or ''
    if (not named or named[id]) and (part == '' or string.find(reason, part, 1, true)) and (since == 0 or since_when >= since)
      and (till == 0 or since_when < till) and (deployment == '' or h.deployment == deployment) then
      count = count + 1
      if operation == 'list' then
        rows[#rows + 1] = { id, number(h.count), number(since_when), entry[2], reason }
        rank = rank + 1
      elseif dry then
        rank = rank + 1
      else
        redis.call('ZREM', parked, id)
        redis.call('HDEL', why, id)
        if operation == 'redrive' then
          h.base = h.count
          save(id, h)
          redis.call('ZADD', nexts, now, id)
        else
          forget(group, id)
        end
      end
    else
      rank = rank + 1
    end
  end
end
if rank > 0 or count >= max then
  -- There may be more: the place is told one too high, since 0 is the end.
  if not redis.call('ZRANGE', parked, rank, rank)[1] then return { count, 0, rows } end
  return { count, rank + 1, rows }
end
if looked >= 5000 and redis.call('ZRANGE', parked, rank, rank)[1] then return { count, rank + 1, rows } end
return { count, 0, rows }
